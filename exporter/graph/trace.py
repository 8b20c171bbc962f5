"""Trace the PyTorch reference into an ONNX graph whose nodes are named after its modules."""

import copyreg
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from msn_export.errors import GraphError
from msn_export.graph.reference import read_head, require_readable
from msn_export.models.vit_msn import VitMsn
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, Head, InputKind

# b batch, n tokens, dim hidden size, c channels, h and w pixels

TRACE_OPSET = 23  # brought Attention; older targets are written from it (msn_export.graph.lower)
_SCOPES = "pkg.torch.onnx.name_scopes"


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
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                (_example(model, stem, batch),),
                dynamo=True,
                opset_version=TRACE_OPSET,
                dynamic_shapes=None if batch.is_static else ({0: torch.export.Dim("batch")},),
                input_names=[stem.tensor],
                output_names=[head.output for head in heads],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise GraphError(f"torch {torch.__version__} cannot export the model: {reason}") from error
    assert program is not None  # only without dynamo is there nothing to return
    traced = program.model
    name_after_modules(traced)
    ClearMetadataAndDocStringPass()(traced)  # stack traces would carry this machine's paths
    return traced


def _example(model: VitMsn, stem: InputKind, batch: BatchRange) -> Tensor:
    # two images for a dynamic batch: torch.export would specialise on one
    images = batch.max if batch.is_static else 2
    size, channels = model.config.image_size, model.config.channels
    if stem is InputKind.FLOAT:
        return torch.empty(images, channels, *size)  # only its shape is looked at
    return torch.empty(images, *size, channels, dtype=torch.uint8)


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
    """The patch convolution on bytes [b, h, w, c], normalisation folded into its weights.

    ``conv((x * scale - mean) / std)`` is ``conv'(x)`` with ``w' = w * scale / std`` and
    ``b' = b - sum(w * mean / std)``; exact in real arithmetic, for the convolution has no padding.
    """

    def __init__(self, patch: nn.Conv2d, preprocessing: Preprocessing) -> None:
        super().__init__()
        std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, -1, 1, 1)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, -1, 1, 1)
        weight = patch.weight.double()
        bias = -(weight * mean / std).sum(dim=(1, 2, 3))
        if patch.bias is not None:
            bias = bias + patch.bias.double()
        self.stride = patch.stride
        self.weight = nn.Parameter(
            (weight * preprocessing.scale / std).float(), requires_grad=False
        )
        self.bias = nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:  # [b, h, w, c] -> [b, dim, rows, columns]
        # Cast before Transpose: TensorRT rejects a UINT8 Transpose
        planes = images.to(self.weight.dtype).permute(0, 3, 1, 2)
        return nn.functional.conv2d(planes, self.weight, self.bias, self.stride)


def name_after_modules(model: ir.Model) -> None:
    """Name each node, value and weight after the module it came from, as ``blocks.3.attn.qkv``.

    The compiler's log carries these names, which is how a kernel is traced back to its block.
    """
    seen: Counter[str] = Counter()
    scope = ""
    for node in model.graph:
        scope = _scope(node) or scope  # nodes that torch adds by itself follow their neighbour
        stem = f"{scope}.{node.op_type}" if scope else node.op_type
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"
    for node in model.graph:
        if node.op_type == "MatMul" and len(node.inputs) == 2:
            weight = node.inputs[1]
            if weight is not None and weight.is_initializer() and len(weight.uses()) == 1:
                assert node.name is not None  # named above
                _rename(model, weight, node.name.removesuffix(".MatMul") + ".weight")
    for name, value in list(model.graph.initializers.items()):
        _rename(model, value, re.sub(r"^(model|stem)\.", "", name))


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    if name != value.name and name not in model.graph.initializers:
        value.name = name


def _scope(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return ""
    names = re.findall(r"'([^']*)'", scopes)[:-1]  # the last one is the node's own name
    modules = [name for name in names if name and not name.startswith("_empty")]
    return re.sub(r"^(model|stem)(\.|$)", "", modules[-1]) if modules else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from reporting, at every export, what a user cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # 'torchvision is not installed'
    try:
        with warnings.catch_warnings():
            # torch.export copies its own pytree specs through this module
            warnings.filterwarnings("ignore", category=FutureWarning, module=copyreg.__name__)
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)
