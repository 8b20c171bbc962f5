"""Tiny ViTs as ONNX files, named by module path as our exporter names them.

``b`` images, ``n`` tokens, ``h`` heads, ``d`` head size (16 or more, or nothing is fused).
"""

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NUMPY = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "uint8": np.dtype(np.uint8),
}
ONNX = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
}
QUANTISED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Vit:
    """What a tiny ViT is made of."""

    dtype: str = "fp16"
    depth: int = 2
    dim: int = 64
    heads: int = 2
    size: int = 32
    patch: int = 16
    attention: str = "heads"  # "heads", "plain", or "float" for a core cast to fp32
    input: str = ""  # dtype of the input, where it differs
    output: str = ""
    batch: int | str = "batch"
    quantised: str = ""  # "int8" or "fp8": Q/DQ around every MatMul with a weight
    zero_point: int = 0
    cls_only: bool = False  # the last block has one query, that of [CLS]
    opset: int = 23
    name: str = "blocks.{block}.{part}"

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + 1


@dataclass
class _Graph:
    vit: Vit
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(
        self, op: str, inputs: list[str], name: str, outputs: int = 1, **attributes
    ) -> list[str]:
        names = [f"{name}_{i}" if outputs > 1 else f"{name}_out" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return names

    def one(self, op: str, inputs: list[str], name: str, **attributes) -> str:
        return self.add(op, inputs, name, **attributes)[0]

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def weight(self, name: str, *shape: int) -> str:
        values = self.rng.normal(0, shape[0] ** -0.5, shape)
        return self.constant(name, values.astype(NUMPY[self.vit.dtype]))

    def norm(self, x: str, name: str) -> str:
        dtype, dim = NUMPY[self.vit.dtype], self.vit.dim
        scale = self.constant(f"{name}.weight", np.ones(dim, dtype))
        bias = self.constant(f"{name}.bias", np.zeros(dim, dtype))
        return self.one("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=1e-6)

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        weight = self.weight(f"{name}.weight", rows, columns)
        if self.vit.quantised:
            x = self.quantise(x, f"{name}.input", ())
            weight = self.quantise(weight, f"{name}.weight", (columns,))
        product = self.one("MatMul", [x, weight], f"{name}.MatMul")
        return self.one("Add", [product, self.weight(f"{name}.bias", columns)], f"{name}.Add")

    def quantise(self, x: str, name: str, shape: tuple[int, ...]) -> str:
        scale = self.constant(f"{name}.scale", np.full(shape, 0.03, NUMPY[self.vit.dtype]))
        kind = QUANTISED[self.vit.quantised]
        count = int(np.prod(shape))
        zeros = helper.make_tensor(f"{name}.zero", kind, shape, [self.vit.zero_point] * count)
        self.weights.append(zeros)
        axis = {"axis": 1} if shape else {}
        x = self.one("QuantizeLinear", [x, scale, zeros.name], f"{name}.Quantize", **axis)
        return self.one("DequantizeLinear", [x, scale, zeros.name], f"{name}.Dequantize", **axis)

    def cast(self, x: str, name: str, dtype: str) -> str:
        return self.one("Cast", [x], name, to=ONNX[dtype])

    def attention(self, x: str, name: str) -> str:
        vit, d = self.vit, self.vit.dim // self.vit.heads
        qkv = self.linear(x, f"{name}.qkv", vit.dim, 3 * vit.dim)  # [b, n, 3 * dim]
        shape = self.ints(f"{name}.split", 0, vit.tokens, 3, vit.heads, d)
        qkv = self.one("Reshape", [qkv, shape], f"{name}.Reshape")
        qkv = self.one("Transpose", [qkv], f"{name}.Transpose", perm=[2, 0, 3, 1, 4])
        parts = self.add("Split", [qkv], f"{name}.Split", outputs=3, axis=0, num_outputs=3)
        axis = self.ints(f"{name}.axis", 0)
        q, k, v = (
            self.one("Squeeze", [part, axis], f"{name}.Squeeze.{i}") for i, part in enumerate(parts)
        )
        y = self.core(q, k, v, name)  # [b, h, n, d]
        y = self.one("Transpose", [y], f"{name}.merge.Transpose", perm=[0, 2, 1, 3])
        shape = self.ints(f"{name}.join", 0, vit.tokens, vit.dim)
        y = self.one("Reshape", [y, shape], f"{name}.merge.Reshape")
        return self.linear(y, f"{name}.proj", vit.dim, vit.dim)

    def core(self, q: str, k: str, v: str, name: str) -> str:
        if self.vit.cls_only and name == self.vit.name.format(
            block=self.vit.depth - 1, part="attn"
        ):
            bounds = [self.ints(f"{name}.cls.{i}", i) for i in range(3)]  # start, end, axis
            q = self.one("Slice", [q, *bounds], f"{name}.cls.Slice")
            y = self.one("Attention", [q, k, v], f"{name}.Attention")
            shape = self.ints(f"{name}.cls.shape", 1, 1, self.vit.tokens, 1)
            return self.one("Expand", [y, shape], f"{name}.cls.Expand")
        if self.vit.attention == "heads":
            return self.one("Attention", [q, k, v], f"{name}.Attention")
        dtype = self.vit.dtype
        if self.vit.attention == "float":
            dtype = "fp32"
            q, k, v = (self.cast(x, f"{name}.Cast.{i}", "fp32") for i, x in enumerate((q, k, v)))
        scale = self.constant(
            f"{name}.scale", np.array((self.vit.dim // self.vit.heads) ** -0.5, NUMPY[dtype])
        )
        q = self.one("Mul", [q, scale], f"{name}.Mul")
        k = self.one("Transpose", [k], f"{name}.k.Transpose", perm=[0, 1, 3, 2])
        scores = self.one("MatMul", [q, k], f"{name}.scores.MatMul")
        p = self.one("Softmax", [scores], f"{name}.Softmax", axis=-1)
        y = self.one("MatMul", [p, v], f"{name}.values.MatMul")
        return self.cast(y, f"{name}.Cast.y", self.vit.dtype) if dtype != self.vit.dtype else y

    def gelu(self, x: str, name: str) -> str:
        if self.vit.opset >= 20:
            return self.one("Gelu", [x], name)
        dtype = NUMPY[self.vit.dtype]
        half, one, root = (
            self.constant(f"{name}.{key}", np.array(value, dtype))
            for key, value in (("half", 0.5), ("one", 1.0), ("root", 2**0.5))
        )
        erf = self.one("Erf", [self.one("Div", [x, root], f"{name}.Div")], f"{name}.Erf")
        gate = self.one("Add", [erf, one], f"{name}.Add")
        x = self.one("Mul", [x, gate], f"{name}.Mul")
        return self.one("Mul", [x, half], f"{name}.Mul.half")

    def block(self, x: str, block: int) -> str:
        dim = self.vit.dim
        part = {
            key: self.vit.name.format(block=block, part=key)
            for key in ("norm1", "attn", "add1", "norm2", "fc1", "gelu", "fc2", "add2")
        }
        y = self.attention(self.norm(x, part["norm1"]), part["attn"])
        x = self.one("Add", [x, y], part["add1"])
        y = self.linear(self.norm(x, part["norm2"]), part["fc1"], dim, 4 * dim)
        y = self.linear(self.gelu(y, part["gelu"]), part["fc2"], 4 * dim, dim)
        return self.one("Add", [x, y], part["add2"])

    def embed(self, x: str) -> str:
        vit = self.vit
        if vit.input == "uint8":
            x = self.cast(x, "input.Cast", vit.dtype)
            x = self.one("Transpose", [x], "input.Transpose", perm=[0, 3, 1, 2])
        elif vit.input not in {"", vit.dtype}:
            x = self.cast(x, "input.Cast", vit.dtype)
        weight = self.weight("patch.weight", vit.dim, 3, vit.patch, vit.patch)
        x = self.one(
            "Conv", [x, weight, self.weight("patch.bias", vit.dim)], "patch.Conv",
            strides=[vit.patch] * 2,
        )  # fmt: skip
        x = self.one("Reshape", [x, self.ints("flat", 0, vit.dim, -1)], "patch.Reshape")
        x = self.one("Transpose", [x], "patch.Transpose", perm=[0, 2, 1])
        size = self.one("Shape", ["x"], "cls.Shape", start=0, end=1)
        ones = [self.ints("one", 1), self.ints("dim", vit.dim)]
        size = self.one("Concat", [size, *ones], "cls.Concat", axis=0)
        cls = self.one("Expand", [self.weight("cls", 1, 1, vit.dim), size], "cls.Expand")
        x = self.one("Concat", [cls, x], "tokens.Concat", axis=1)
        return self.one("Add", [x, self.weight("pos", 1, vit.tokens, vit.dim)], "pos.Add")


def save(vit: Vit, path: Path) -> Path:
    """Write ``vit`` with seeded weights and give the path back."""
    graph = _Graph(vit)
    x = graph.embed("x")
    for block in range(vit.depth):
        x = graph.block(x, block)
    x = graph.norm(x, "norm")
    output = vit.output or vit.dtype
    if output != vit.dtype:
        x = graph.cast(x, "output.Cast", output)
    pixels = [vit.batch, 3, vit.size, vit.size]
    if vit.input == "uint8":
        pixels = [vit.batch, vit.size, vit.size, 3]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "vit",
            [helper.make_tensor_value_info("x", ONNX[vit.input or vit.dtype], pixels)],
            [helper.make_tensor_value_info(x, ONNX[output], [vit.batch, vit.tokens, vit.dim])],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", vit.opset)],
        ir_version=min(11, 8 if vit.opset < 18 else 11),
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
