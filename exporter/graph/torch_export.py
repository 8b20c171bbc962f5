"""Trace the PyTorch reference into an ONNX graph whose nodes are named after its modules.

A symbolic trace and a table of operators, which for a ViT-B takes a tenth of a second where
``torch.onnx.export`` takes five; the tests compare the two.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder
from msn_export.graph.torch_ops import CALLS, MODULES, weight_of
from msn_export.graph.torch_reference import read_head, require_readable
from msn_export.models.vit import VitMsn
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, Head, InputFormat


def with_normalisation(patch: nn.Conv2d, preprocessing: Preprocessing) -> nn.Conv2d:
    """Give the convolution that does on bytes what ``patch`` does on normalised planes.

    ``conv((x * scale - mean) / std)`` is ``conv'(x)`` with ``w' = w * scale / std`` and
    ``b' = b - sum(w * mean / std)``; exact in real arithmetic, for the convolution has no padding.
    """
    std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, -1, 1, 1)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, -1, 1, 1)
    weight = patch.weight.double()
    bias = -(weight * mean / std).sum(dim=(1, 2, 3))
    if patch.bias is not None:
        bias = bias + patch.bias.double()
    with torch.device("meta"):
        folded = nn.Conv2d(patch.in_channels, patch.out_channels, patch.kernel_size, patch.stride)  # type: ignore[arg-type]
    folded.weight = _constant(weight * preprocessing.scale / std)
    folded.bias = _constant(bias)
    return folded


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)


# b batch, n tokens, dim hidden size, c channels, h and w pixels


class ExportedModule(nn.Module):
    """Images as the graph takes them, to one tensor a head."""

    def __init__(
        self,
        model: VitMsn,
        heads: Sequence[Head],
        input_format: InputFormat,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        require_readable(model, heads)
        self.model, self.heads = model, tuple(heads)
        self.takes_bytes = input_format is InputFormat.UINT8
        self.patch = (
            with_normalisation(model.patch, preprocessing) if self.takes_bytes else model.patch
        )
        self.pos_embed = _constant(model.positions())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run planes [b, c, h, w], or bytes [b, h, w, c]."""
        if self.takes_bytes:
            # Cast before Transpose: TensorRT rejects a UINT8 Transpose
            images = images.to(torch.float32).permute(0, 3, 1, 2)
        hidden = self.model.encode(self.patch(images), self.pos_embed)
        return tuple(read_head(self.model, head, hidden) for head in self.heads)


# Wrappers around the model whose names say nothing of it
_WRAPPERS = re.compile(r"^model(\.|$)")


def translate(traced: fx.Graph, root: nn.Module, images: ir.Value) -> ir.Graph:
    """Write a trace of ``root``, whose one input is ``images``."""
    graph = ir.Graph([images], [], nodes=[], opset_imports={"": TRACE_OPSET}, name="main_graph")
    builder = GraphBuilder(graph)
    known: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        builder.scope = _scope(node) or builder.scope  # what no module does follows its neighbour
        match node.op:
            case "placeholder":
                known[node] = images
            case "get_attr":
                parameter = root.get_parameter(node.target)
                known[node] = weight_of(builder, _WRAPPERS.sub("", node.target), parameter)
            case "output":
                graph.outputs.extend(args[0])
                return graph
            case _:
                known[node] = _call(builder, root, node, args, kwargs)
    raise GraphError("the trace has no output")


def _call(
    builder: GraphBuilder,
    root: nn.Module,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    name = str(node.target) if isinstance(node.target, str) else node.target.__name__
    write: Callable[..., Any] | None
    if node.op == "call_module":
        module = root.get_submodule(name)
        write, args = MODULES.get(type(module)), (*args, module, _WRAPPERS.sub("", name))
        name = type(module).__name__
    elif callable(node.target) and not _has_values(args):
        return node.target(*args, **kwargs)  # arithmetic on sizes
    else:
        write = CALLS.get(name)
    if write is None:
        raise GraphError(f"the model calls {name}, which has no ONNX form here")
    try:
        return write(builder, *args, **kwargs)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise GraphError(f"the model's {name} has no ONNX form here: {reason}") from error


def _has_values(args: Any) -> bool:
    if isinstance(args, tuple | list):
        return any(map(_has_values, args))
    return isinstance(args, ir.Value)


def _scope(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return _WRAPPERS.sub("", stack[-1][0]) if stack else ""


# b batch, n tokens, dim hidden size, c channels, h and w pixels

TRACE_OPSET = 23  # brought Attention; older targets are written from it (msn_export.graph.opset)
IR_VERSION = 10  # onnx/docs/Versioning.md; 11 added what this graph does not use


def trace(
    model: VitMsn,
    *,
    heads: Sequence[Head],
    input_format: InputFormat,
    batch: BatchRange,
    preprocessing: Preprocessing,
) -> ir.Model:
    """Trace ``model`` at opset 23, batch the only dynamic axis.

    The graph's initializers share memory with the model's parameters where the layout allows.
    """
    wrapped = ExportedModule(model, heads, input_format, preprocessing).eval()
    try:
        traced = fx.Tracer().trace(wrapped)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"torch {torch.__version__} cannot trace the model: {reason}") from error
    graph = translate(traced, wrapped, _images(model, input_format, batch))
    for head, value in zip(heads, graph.outputs, strict=True):
        value.name = head.output
    return ir.Model(graph, ir_version=IR_VERSION)


def _images(model: VitMsn, input_format: InputFormat, batch: BatchRange) -> ir.Value:
    count = batch.max if batch.is_static else ir.SymbolicDim("batch")
    (height, width), channels = model.config.image_size, model.config.channels
    if input_format is InputFormat.FLOAT:
        shape, dtype = (count, channels, height, width), ir.DataType.FLOAT
    else:
        shape, dtype = (count, height, width, channels), ir.DataType.UINT8
    return ir.Value(name=input_format.tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
