"""Trace the PyTorch reference into an ONNX graph whose nodes are named after its modules.

A symbolic trace and a table of operators, which for a ViT-B takes a tenth of a second where
``torch.onnx.export`` takes five; the tests compare the two.
"""

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from msn_export.errors import GraphError
from msn_export.graph.fold import with_normalisation
from msn_export.graph.reference import read_head, require_readable
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
    require_readable(model, heads)
    wrapped = _Graph(model, heads, stem, preprocessing).eval()
    try:
        traced = fx.Tracer().trace(wrapped)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"torch {torch.__version__} cannot trace the model: {reason}") from error
    draft, outputs = translate(traced, wrapped, _images(model, stem, batch))
    for head, value in zip(heads, outputs, strict=True):
        value.name = head.output
    graph = ir.Graph(
        [draft.images],
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


class _Graph(nn.Module):
    """The model between its input stem and its heads."""

    def __init__(
        self,
        model: VitMsn,
        heads: Sequence[Head],
        stem: InputKind,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = tuple(heads)
        self.stem = _Uint8Stem(model.patch, preprocessing) if stem is InputKind.UINT8 else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.stem is None:
            tokens = self.model(images)
        else:
            tokens = self.model.encode(self.stem(images))
        return tuple(read_head(self.model, head, tokens) for head in self.heads)


class _Uint8Stem(nn.Module):
    """The patch convolution on bytes [b, h, w, c], normalisation folded into its weights."""

    def __init__(self, patch: nn.Conv2d, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.patch = with_normalisation(patch, preprocessing)

    def forward(self, images: Tensor) -> Tensor:  # [b, h, w, c] -> [b, dim, rows, columns]
        # Cast before Transpose: TensorRT rejects a UINT8 Transpose
        patches: Tensor = self.patch(images.to(torch.float32).permute(0, 3, 1, 2))
        return patches
