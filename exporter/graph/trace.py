"""Trace the PyTorch reference into an ONNX graph whose nodes are named after its modules.

A symbolic trace and a table of operators, which for a ViT-B takes a tenth of a second where
``torch.onnx.export`` takes five; the tests compare the two.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import fx

from msn_export.errors import GraphError
from msn_export.graph.module import ExportedModule
from msn_export.graph.translate import translate
from msn_export.models.vit_msn import VitMsn
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, Head, InputKind

# b batch, n tokens, dim hidden size, c channels, h and w pixels

TRACE_OPSET = 23  # brought Attention; older targets are written from it (msn_export.graph.lower)
IR_VERSION = 10  # onnx/docs/Versioning.md; 11 added what this graph does not use


def trace(
    model: VitMsn,
    *,
    heads: Sequence[Head],
    stem: InputKind,
    batch: BatchRange,
    preprocessing: Preprocessing,
) -> ir.Model:
    """Trace ``model`` at opset 23, batch the only dynamic axis.

    The graph's initializers share memory with the model's parameters where the layout allows.

    Raises:
        GraphError: torch cannot export the model, or a head asks for a classifier it lacks.
    """
    wrapped = ExportedModule(model, heads, stem, preprocessing).eval()
    try:
        traced = fx.Tracer().trace(wrapped)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"torch {torch.__version__} cannot trace the model: {reason}") from error
    images = _images(model, stem, batch)
    draft, outputs = translate(traced, wrapped, images)
    for head, value in zip(heads, outputs, strict=True):
        value.name = head.output
    graph = ir.Graph(
        [images],
        outputs,
        nodes=draft.nodes,
        initializers=tuple(draft.initializers.values()),
        opset_imports={"": TRACE_OPSET},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=IR_VERSION)


def _images(model: VitMsn, stem: InputKind, batch: BatchRange) -> ir.Value:
    count = batch.max if batch.is_static else ir.SymbolicDim("batch")
    (height, width), channels = model.config.image_size, model.config.channels
    if stem is InputKind.FLOAT:
        shape, dtype = (count, channels, height, width), ir.DataType.FLOAT
    else:
        shape, dtype = (count, height, width, channels), ir.DataType.UINT8
    return ir.Value(name=stem.tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
