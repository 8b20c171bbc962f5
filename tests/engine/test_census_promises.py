"""What a graph computes in fp32, its engine does too, or it is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from msn_export.commands.trt_graph import asked_of
from msn_export.engine.build import build_engine
from msn_export.engine.census import AskedNode, island_faults, require
from msn_export.engine.kernels import Constant, Kernel
from msn_export.engine.options import BuildSpec
from msn_export.errors import BuildError
from msn_export.graph import io
from msn_export.graph.precision import type_graph
from msn_export.spec import BatchRange, ComputeCapability, Dtype
from tests.builders.engine_builds import NEEDS_RTX, rtx
from tests.builders.graphs import parse

# An island of a product, an addition of 64 biases and a LayerNorm beside a product in Half.
NODES = {
    "fc": AskedNode(fp32=True, product=True, constants=((64, 32),)),
    "add": AskedNode(fp32=True, constants=((32,),)),
    "move": AskedNode(fp32=True, moves=True),
    "half": AskedNode(fp32=False, product=True, constants=((32, 32),)),
    "bias": AskedNode(fp32=False, constants=((32,),)),
    "q": AskedNode(fp32=False, product=True, constants=((32, 8),)),
    "k": AskedNode(fp32=False, product=True, constants=((32, 8),)),
    "conv": AskedNode(fp32=False, product=True, constants=((8, 3, 2, 2),)),
}


def kernel(name: str, layers: str, *constants: tuple[str, tuple[int, ...]], io: str = "Half"):
    held = tuple(Constant(f"c{i}", dtype, shape) for i, (dtype, shape) in enumerate(constants))
    return Kernel(f"__myl_{name}_myl0_1", "kgen", (io,), (io,), held, tuple(layers.split()))


FLOAT, HALF = ("Float", (64, 32)), ("Half", (64, 32))


@pytest.mark.parametrize(
    "made",
    [
        kernel("FcCast", "fc", FLOAT),
        kernel("FcAddCast", "fc add", FLOAT, ("Float", (1, 32))),
        # what is fused with an island may be in half precision
        kernel("FcAddCastAdd", "half bias add", ("Half", (32, 32)), ("Half", (1, 32)),
               ("Float", (1, 32))),
        kernel("FcCastAdd", "q k add", ("Half", (32, 16)), ("Float", (1, 32))),
        kernel("ConvCastAdd", "conv add", ("Half", (8, 4, 2, 2)), ("Float", (1, 32))),
        # a scalar is a kernel's own
        kernel("CastAdd", "add", ("Half", (1, 1)), ("Float", (1, 32))),
        # elements may move in any type: no number changes
        kernel("Tran", "move"),
    ],
)  # fmt: skip
def test_a_kept_promise(made: Kernel) -> None:
    others = [kernel("FcCast", "fc", FLOAT)]
    assert island_faults([made, *others], NODES) == []


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (kernel("Fc", "fc", HALF), "fc multiplies in Half, and the graph asks for fp32"),
        (kernel("FcAddCast", "fc add", ("BFloat16", (64, 32)), ("Float", (1, 32))),
         "fc multiplies in BFloat16, and the graph asks for fp32"),
        (kernel("FcAddCast", "fc add", FLOAT, ("Half", (1, 32))),
         "fc is fp32 in the graph, and its kernel has a constant in Half"),
        # one of the two biases of 32 is the island's
        (kernel("FcAddCastAdd", "half bias add", ("Half", (32, 32)), ("Half", (1, 32)),
                ("Half", (1, 32))),
         "add is fp32 in the graph, and its kernel has a constant in Half"),
        (kernel("FcAddAdd", "half bias add", ("Half", (32, 32)), ("Half", (1, 32))),
         "add is fp32 in the graph, and its kernel computes in half precision"),
    ],
)  # fmt: skip
def test_a_broken_promise(made: Kernel, fault: str) -> None:
    others = [kernel("FcCast", "fc", FLOAT)]
    assert island_faults([made, *others], NODES) == [fault]


def test_a_product_that_no_kernel_names_is_not_proven() -> None:
    assert island_faults([kernel("CastAdd", "add", ("Float", (1, 32)))], NODES) == [
        "no kernel names fc, which the graph computes in fp32"
    ]


# --- the real compiler --------------------------------------------------------------------------

BIG = 119111.0  # a weight of a published checkpoint; fp16 ends at 65504
MODEL = """
g (float[b,4,64] x) => (float[b,4,64] y) {
    n = LayerNormalization <axis = -1> (x, gain)
    h = MatMul (n, w)
    s = Add (h, bias)
    a = Gelu (s)
    y = MatMul (a, v)
}
"""


def weight(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).standard_normal(shape) * 0.1
    return values.astype(np.float32)


def two_products(place: str) -> ir.Model:
    """Make LayerNorm, product, bias, GELU, product, with one value of 119111."""
    arrays = {"gain": weight((64,), 0) + 1, "w": weight((64, 128), 1), "bias": weight((128,), 2),
              "v": weight((128, 64), 3)}  # fmt: skip
    arrays[place].flat[33] = BIG
    text = ", ".join(
        f"float[{','.join(map(str, array.shape))}] {name} = "
        f"{{{', '.join(f'{x:.8g}' for x in array.flat)}}}"
        for name, array in arrays.items()
    )
    return parse(MODEL.replace(") {", f") <{text}> {{"))


def compiled(model: ir.Model, folder: Path, capability: str):
    io.save(model, folder / "m.onnx")
    spec = BuildSpec(
        folder / "m.onnx", (BatchRange(1, 2, 4),), (ComputeCapability.parse(capability),)
    )
    return build_engine(spec, rtx(), folder / "m.engine")


def stored(engine: Path, weights: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    """Find a weight's own bytes in an engine, in fp16 or fp32, row- or column-major."""
    content = engine.read_bytes()
    found = []
    for dtype in (np.float16, np.float32):
        for order in (weights, weights.T):
            with np.errstate(over="ignore"):
                rounded = np.ascontiguousarray(order).astype(dtype)
            if rounded.tobytes() in content:
                found.append(rounded if order is weights else rounded.T)
    return found


@NEEDS_RTX
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
@pytest.mark.parametrize("place", ["w", "v"])
def test_a_weight_above_fp16s_range_is_finite_in_the_engine(place, capability, tmp_path) -> None:
    model = two_products(place)
    typed = type_graph(model, Dtype.FP16)
    assert typed.weights == {place: BIG}
    result = compiled(model, tmp_path, capability)
    require(result.census, depth=0, precision="fp16", allow_unfused=True, asked=asked_of(model))
    held = model.graph.initializers[place].const_value
    assert held is not None
    weights = held.numpy()
    (found,) = stored(result.output, weights)
    assert found[np.abs(weights) > 65504].tolist() == [BIG]
    assert result.census.gemm_dtypes == {"Half": 1, "Float": 1}


@NEEDS_RTX
@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
def test_an_island_that_the_compiler_narrows_is_refused(capability, tmp_path, monkeypatch) -> None:
    """Typed as this package typed it once: a cast back to Half right behind the product."""
    monkeypatch.setattr("msn_export.graph.precision._products_of", lambda *_: set())
    model = two_products("w")
    type_graph(model, Dtype.FP16)
    result = compiled(model, tmp_path, capability)
    held = model.graph.initializers["w"].const_value
    assert held is not None
    (found,) = stored(result.output, held.numpy())
    assert np.isinf(found).sum() == 1  # what is refused below
    with pytest.raises(BuildError, match="MatMul1 multiplies in Half, and the graph asks for fp32"):
        require(result.census, depth=0, precision="fp16", allow_unfused=True, asked=asked_of(model))


@NEEDS_RTX
@pytest.mark.parametrize("place", ["gain", "bias"])
def test_gains_and_biases_above_fp16s_range_stay_in_fp32(place, tmp_path) -> None:
    model = two_products(place)
    held = model.graph.initializers[place].const_value
    assert held is not None
    type_graph(model, Dtype.FP16)
    result = compiled(model, tmp_path, "8.9")
    require(result.census, depth=0, precision="fp16", allow_unfused=True, asked=asked_of(model))
    assert stored(result.output, held.numpy())[-1].dtype == np.float32
    halved = tuple(
        replace(k, constants=tuple(replace(c, dtype="Half") for c in k.constants))
        for k in result.census.kernels
    )
    with pytest.raises(BuildError, match="has a constant in Half"):
        require(replace(result.census, kernels=halved), depth=0, precision="fp16",
                allow_unfused=True, asked=asked_of(model))  # fmt: skip
