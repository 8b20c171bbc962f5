"""Small vision transformers as other tools write them: torch's exporters, and what follows them."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor, nn
from transformers import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel

from tests.builders.checkpoints import TINY, randomised

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = {0: "batch"}
# The inputs of a ViTOnnxConfig: Hugging Face's optimum, and transformers before it
OPTIMUM = {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}


class Reading(nn.Module):
    """A model and what is read off it."""

    def __init__(self, model: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.read(self.model, pixel_values)


def cls(model: nn.Module, pixels: Tensor) -> Tensor:
    vectors: Tensor = model(pixels).last_hidden_state[:, 0]
    return vectors


def encoder(attention: str = "sdpa") -> nn.Module:
    """Give transformers' model, of 2 blocks."""
    model = randomised(ViTMSNModel(ViTMSNConfig(**TINY)))
    model.config._attn_implementation = attention
    return model


def classifier(labels: int = 3) -> nn.Module:
    return randomised(ViTMSNForImageClassification(ViTMSNConfig(**TINY, num_labels=labels)))


class Attention(nn.Module):
    """One projection for query, key and value, taken apart along the first axis, as timm does."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        apart = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = apart.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(x.transpose(1, 2).reshape(b, n, dim))
        return y


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class TimmLike(nn.Module):
    """A vision transformer written as timm writes it; ``pool`` ends in an attention pool."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        dim, heads = 64, 2
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, 17, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 5)
        self.pool = nn.MultiheadAttention(dim, heads, batch_first=True) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        first = self.cls.expand(x.shape[0], -1, -1)
        x = torch.cat([first, x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool is not None:
            x = self.pool(first, x, x, need_weights=False)[0]
        y: Tensor = self.head(x[:, 0])
        return y


def scripted(
    path: Path,
    model: nn.Module,
    opset: int = 17,
    images: Tensor = IMAGES,
    axes: dict[int, str] = BATCH,
    output: str = "out",
) -> Path:
    """Export through TorchScript, as most files were made."""
    _quietly(
        model, images, path, dynamo=False, opset_version=opset, input_names=["pixel_values"],
        output_names=[output], dynamic_axes={"pixel_values": axes, output: {0: "batch"}},
    )  # fmt: skip
    return path


def exported(path: Path, model: nn.Module, opset: int = 18, output: str = "out") -> Path:
    """Export through torch.export, torch's exporter since 2.9."""
    batch = torch.export.Dim("batch")
    _quietly(
        model, IMAGES, path, dynamo=True, opset_version=opset, input_names=["pixel_values"],
        output_names=[output], dynamic_shapes=({0: batch},), verbose=False, external_data=False,
    )  # fmt: skip
    return path


def _quietly(model: nn.Module, images: Tensor, path: Path, **options: Any) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # of torch, about its own exporters
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (images,), path, **options)


# --- what other tools make of a graph -------------------------------------------------------------


def rewritten(path: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """Change a file in place."""
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, path)
    return path


def shuffle(graph: onnx.GraphProto) -> None:
    """Turn the nodes' order round, and drop what is known of the values."""
    nodes = list(graph.node)[::-1]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def softmax_in_parts(graph: onnx.GraphProto) -> None:
    """Write Softmax as exporters do that do not know its rank: exp(x - max x) / sum."""

    def parts(x: str, y: str) -> list[onnx.NodeProto]:
        def over_last(op: str, a: str) -> onnx.NodeProto:
            return onnx.helper.make_node(op, [a], [f"{y}.{op}"], axes=[-1], keepdims=1)

        return [
            over_last("ReduceMax", x),
            onnx.helper.make_node("Sub", [x, f"{y}.ReduceMax"], [f"{y}.shifted"]),
            onnx.helper.make_node("Exp", [f"{y}.shifted"], [f"{y}.exp"]),
            over_last("ReduceSum", f"{y}.exp"),
            onnx.helper.make_node("Div", [f"{y}.exp", f"{y}.ReduceSum"], [y]),
        ]

    _replace_softmax(graph, parts)


def softmax_of_rows(graph: onnx.GraphProto) -> None:
    """Write Softmax over two axes, which is all that opset 12 has."""
    for name, sizes in (("rows", [-1, 17]), ("scores", [-1, 2, 17, 17])):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(sizes), name))

    def flattened(x: str, y: str) -> list[onnx.NodeProto]:
        return [
            onnx.helper.make_node("Reshape", [x, "rows"], [f"{y}.rows"]),
            onnx.helper.make_node("Softmax", [f"{y}.rows"], [f"{y}.softmax"], axis=1),
            onnx.helper.make_node("Reshape", [f"{y}.softmax", "scores"], [y]),
        ]

    _replace_softmax(graph, flattened)


def _replace_softmax(
    graph: onnx.GraphProto, write: Callable[[str, str], list[onnx.NodeProto]]
) -> None:
    nodes = []
    for node in graph.node:
        nodes += write(node.input[0], node.output[0]) if node.op_type == "Softmax" else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def fused_by_onnxruntime(path: Path, level: str = "EXTENDED") -> Path:
    """Optimise with onnxruntime: its session's level, or else its tool for transformers."""
    target = path.with_name(f"fused.{path.name}")
    if level == "transformers":
        logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
        optimize_model(str(path), "vit", num_heads=2, hidden_size=64).save_model_to_file(
            str(target)
        )
        return target
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.optimized_model_filepath, options.log_severity_level = str(target), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return target


def without_last_skip(graph: onnx.GraphProto) -> None:
    """Lose the last residual addition, which onnxruntime fused with the norm behind it."""
    last = [node for node in graph.node if node.op_type == "SkipLayerNormalization"][-1]
    last.input[1] = last.input[0]


def halved(path: Path, *, keep_io_types: bool, **options: Any) -> Path:
    """Convert to fp16 with onnxruntime's converter, a copy of onnxconverter-common's."""
    with warnings.catch_warnings():  # numbers it cuts off
        warnings.simplefilter("ignore")
        proto = convert_float_to_float16(onnx.load(path), keep_io_types=keep_io_types, **options)
    target = path.with_name(f"half.{path.name}")
    onnx.save(proto, target)
    return target


class Reader(CalibrationDataReader):
    """Four batches of noise, or those that are given."""

    def __init__(self, given: Sequence[np.ndarray[Any, Any]] = ()) -> None:
        generator = np.random.default_rng(0)
        shape = tuple(IMAGES.shape)
        noise = [generator.standard_normal(shape, np.float32) for _ in range(4)]
        self.left = list(given) or noise

    def get_next(self) -> dict[str, Any] | None:
        return {"pixel_values": self.left.pop()} if self.left else None


def quantised(
    path: Path,
    *,
    attention: bool = False,
    symmetric: bool = True,
    form: QuantFormat = QuantFormat.QDQ,
    reader: CalibrationDataReader | None = None,
) -> Path:
    """Quantise with onnxruntime: products with weights, or all it knows, attention included.

    It writes Q/DQ behind products too.
    """
    target = path.with_name(f"quantised.{path.name}")
    options: dict[str, Any] = {}
    if not attention:
        options = {
            "op_types_to_quantize": ["MatMul", "Gemm", "Conv"],
            "nodes_to_exclude": products_without_weight(onnx.load(path).graph),
        }
    logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess the graph
    quantize_static(
        path, target, Reader() if reader is None else reader, quant_format=form, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True}, **options,
    )  # fmt: skip
    return target


def quantised_dynamically(path: Path) -> Path:
    target = path.with_name(f"dynamic.{path.name}")
    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(path, target)
    return target


def products_without_weight(graph: onnx.GraphProto) -> list[str]:
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and not weights.intersection(node.input)
    ]
