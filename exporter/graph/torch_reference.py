"""The PyTorch reference: run it, and trace it into an ONNX graph.

The graph's nodes are named after the model's modules. A symbolic trace and a table of operators
take a tenth of a second for a ViT-B where ``torch.onnx.export`` takes five; the tests compare the
two.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from msn_export.errors import GraphError
from msn_export.graph.blocks import ENTRY, TENSORS
from msn_export.graph.builder import GraphBuilder
from msn_export.graph.torch_ops import CALLS, MODULES, weight_of
from msn_export.models.config import READS, VitConfig
from msn_export.models.vit import Hidden, VitMsn
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, Head, InputFormat

# b batch, n tokens, dim hidden size

Result = TypeVar("Result")


def read_head(model: VitMsn, head: Head, hidden: Hidden) -> Tensor:
    """Read a head off what the model computed.

    ``mean`` averages the patch tokens without [CLS]: facebookresearch/msn src/deit.py,
    ``forward_return_n_last_blocks(return_patch_avgpool=True)``.
    """
    config = model.config
    match head:
        case Head.TOKENS:
            return hidden.tokens
        case Head.LOGITS:
            return model.classify(hidden)
        case Head.ATTENTION:
            assert hidden.attention is not None
            to_patches = hidden.attention[:, :, 0, 1:]
            maps: Tensor = to_patches.unflatten(-1, config.grid)  # type: ignore[no-untyped-call]
            return maps
        case Head.MEAN:
            row = hidden.tokens[:, 1:].mean(dim=1)
        case Head.CLS:
            row = model.embedding(hidden, config.blocks)
        case Head.FEATURES:
            row = model.features(hidden, config.blocks)
    return F.normalize(row, dim=-1) if config.normalize else row


def states(heads: Sequence[Head], config: VitConfig) -> dict[str, Any]:
    """Give the arguments of ``VitMsn.hidden`` that ``heads`` need."""
    several = Head.FEATURES in heads or (Head.CLS in heads and config.blocks > 1)
    return {"blocks": config.blocks if several else 0, "attention": Head.ATTENTION in heads}


_NORMALISED = (Head.CLS, Head.MEAN, Head.TOKENS)  # read behind the final LayerNorm


def require_readable(model: VitMsn, heads: Sequence[Head]) -> None:
    if Head.LOGITS in heads and model.classifier is None:
        raise GraphError("head logits needs a classifier, this checkpoint has none; use cls")
    if Head.ATTENTION in heads and model.config.kept:
        raise GraphError("head attention is a map of all patches; leave --keep-patches out")
    rest = [head for head in heads if head in _NORMALISED]
    if rest and model.norm is None:
        raise GraphError(
            f"head {rest[0]} needs the final LayerNorm, which this checkpoint lacks (its "
            f"classifier reads {READS[model.config.pooling]}); use logits, or the pre-trained "
            "checkpoint"
        )


def readable_heads(model: VitMsn) -> tuple[Head, ...]:
    held = dict.fromkeys(_NORMALISED, model.norm is not None)
    held |= {Head.LOGITS: model.classifier is not None, Head.ATTENTION: not model.config.kept}
    return tuple(head for head in Head if held.get(head, True))


class TorchRunner:
    """The reference in fp32 on the CPU, outputs by name as the graph has them.

    ``exact`` runs a copy in fp64, against which the rounding of fp32 shows.
    """

    def __init__(self, model: VitMsn, heads: Sequence[Head], *, exact: bool = False) -> None:
        require_readable(model, heads)
        self.model = _widened(model) if exact else model
        self.heads = tuple(heads)
        self.dtype = torch.float64 if exact else torch.float32
        self.name = f"torch {torch.__version__}, cpu, {'fp64' if exact else 'fp32'}"

    def __call__(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Run normalised planes [b, c, h, w]."""
        with torch.inference_mode():
            pixels = torch.from_numpy(pixel_values).to(self.dtype)
            hidden = self.model.hidden(pixels, **states(self.heads, self.model.config))
            return {head.output: read_head(self.model, head, hidden).numpy() for head in self.heads}

    def close(self) -> None:
        """Do nothing: the model is the checkpoint's."""


def _widened(model: VitMsn) -> VitMsn:
    """Copy a model to compute in fp64; a layer's weights are fp64 while it runs, no longer.

    The fp32 weights are shared: all of them in fp64 would take twice the memory of the model.
    """
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in model.parameters()
    }
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        own = {weight: weight.data for weight in module.parameters(recurse=False)}
        if module is copied:  # read without a call of the module
            for weight, narrow in own.items():
                weight.data = narrow.double()
        elif own:
            _widen_in_calls(module, own)
    return copied


def _widen_in_calls(module: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> None:
    def widen(*_: Any) -> None:
        for weight, narrow in weights.items():
            weight.data = narrow.double()

    def narrow_again(*_: Any) -> None:
        for weight, narrow in weights.items():
            weight.data = narrow

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow_again, always_call=True)


class InThread(Generic[Result]):
    """Work with a model in a thread of its own, beside steps that use one core.

    It has half of PyTorch's threads until it is waited for, then all of them. Leaving the context
    ends it at the model's next block. No model may be traced meanwhile: that changes what a call
    of any module does.
    """

    def __init__(self, model: VitMsn, work: Callable[[], Result]) -> None:
        self._model, self._work = model, work
        self._is_waited_for, self._is_over = Event(), Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reference")

    def __enter__(self) -> Self:
        self._future = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown()

    def result(self) -> Result:
        """Wait for what the work gives, or raise what it raised."""
        self._is_waited_for.set()
        return self._future.result()

    def _run(self) -> Result:
        threads = torch.get_num_threads()
        waited_for, over = self._is_waited_for, self._is_over

        def at_block(*_: Any) -> None:
            if over.is_set():
                raise CancelledError
            torch.set_num_threads(threads if waited_for.is_set() else max(1, threads // 2))

        blocks = cast("Sequence[nn.Module]", self._model.blocks)
        handles = [block.register_forward_pre_hook(at_block) for block in blocks]
        try:
            return self._work()
        finally:
            for handle in handles:
                handle.remove()
            torch.set_num_threads(threads)


def shaken(model: VitMsn, seed: int) -> VitMsn:
    """Copy a model with every weight moved within half of its last bit, as fp32 rounds it."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model).requires_grad_(requires_grad=False)
    for weight in moved.parameters():
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(weight.double() * (1 + (2 * drawn - 1) * 2.0**-24))
    return moved


class Heads(nn.Module):
    """A model with what is read off it: images [b, c, h, w] to one tensor a head."""

    def __init__(self, model: VitMsn, heads: Sequence[Head]) -> None:
        super().__init__()
        require_readable(model, heads)
        self.model, self.heads = model, tuple(heads)
        self.states = states(heads, model.config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return self.read(self.model.hidden(pixel_values, **self.states))

    def read(self, hidden: Hidden) -> tuple[Tensor, ...]:
        """Read every head."""
        return tuple(read_head(self.model, head, hidden) for head in self.heads)


class TorchStream:
    """The reference with tensors of its blocks shown, by hooks.

    Stages are ``patch embedding``, ``block N`` and the outputs; ``names`` chooses what comes out.
    With every batch ``peaks`` grows: the largest absolute value by stage, and which tensor has it.
    A stage that is given takes the place of what the model computes: what follows reads that.
    """

    def __init__(
        self, model: VitMsn, heads: Sequence[Head], names: Collection[str], *, exact: bool = False
    ) -> None:
        self.runner = TorchRunner(model, heads, exact=exact)
        self.name = self.runner.name
        self.names = frozenset(names)
        self.peaks: dict[str, tuple[float, str]] = {}
        self._seen: dict[str, NDArray[Any]] = {}

    def __call__(
        self,
        pixel_values: NDArray[np.float32],
        given: Mapping[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run normalised planes [b, c, h, w]; the hooks are gone afterwards."""
        self._seen = {}
        handles = [*self._watch(), *self._replace(given or {})]
        try:
            outputs = self.runner(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        return self._seen | outputs

    def close(self) -> None:
        self.runner.close()

    def _watch(self) -> Iterator[RemovableHandle]:
        blocks = cast("Sequence[nn.Module]", self.runner.model.blocks)
        yield self._on(blocks[0], ENTRY, (ENTRY,), given=True)
        for number, block in enumerate(blocks):
            stage = f"block {number}"
            for tensor in TENSORS:
                module = block.get_submodule(tensor.path)
                yield self._on(module, stage, tensor.names(number), given=tensor.given)
            yield self._on(block, stage, (stage,), given=False)

    def _replace(self, given: Mapping[str, NDArray[Any]]) -> Iterator[RemovableHandle]:
        """Hand on what is given for a stage in place of what was computed, and noted, there."""
        blocks = cast("Sequence[nn.Module]", self.runner.model.blocks)
        tensors = {
            stage: torch.from_numpy(np.ascontiguousarray(array)).to(self.runner.dtype)
            for stage, array in given.items()
        }
        if ENTRY in tensors:
            yield blocks[0].register_forward_pre_hook(lambda *_: (tensors[ENTRY],))
        for number, block in enumerate(blocks):
            if f"block {number}" in tensors:
                yield block.register_forward_hook(
                    lambda *_, stage=f"block {number}": tensors[stage]
                )

    def _on(
        self, module: nn.Module, stage: str, names: tuple[str, ...], *, given: bool
    ) -> RemovableHandle:
        if given:
            return module.register_forward_pre_hook(
                lambda _module, read: self._note(read[0], stage, names)
            )
        return module.register_forward_hook(
            lambda _module, _read, output: self._note(output, stage, names)
        )

    def _note(self, tensor: Tensor, stage: str, names: tuple[str, ...]) -> None:
        peak = float(tensor.abs().max())
        if stage not in self.peaks or not peak <= self.peaks[stage][0]:
            self.peaks[stage] = (peak, names[0])
        self._seen |= {name: tensor.numpy() for name in names if name in self.names}


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


class ExportedModule(Heads):
    """Images as the graph takes them, to one tensor a head."""

    def __init__(
        self,
        model: VitMsn,
        heads: Sequence[Head],
        input_format: InputFormat,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(model, heads)
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
        return self.read(self.model.encode(self.patch(images), self.pos_embed, **self.states))


# Wrappers around the model whose names say nothing of it
_WRAPPERS = re.compile(r"^model(\.|$)")


def translate(traced: fx.Graph, root: nn.Module, images: ir.Value) -> ir.Graph:
    """Write a trace of ``root``, whose one input is ``images``."""
    graph = ir.Graph([images], [], nodes=[], opset_imports={"": TRACE_OPSET}, name="main_graph")
    builder = GraphBuilder(graph)
    values: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        builder.scope = _scope(node) or builder.scope  # what no module does follows its neighbour
        match node.op:
            case "placeholder":
                values[node] = images
            case "get_attr":
                parameter = root.get_parameter(node.target)
                values[node] = weight_of(builder, _WRAPPERS.sub("", node.target), parameter)
            case "output":
                graph.outputs.extend(args[0])
                return graph
            case _:
                values[node] = _call(builder, root, node, args, kwargs)
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
