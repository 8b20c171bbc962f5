"""What fused attention sums in is read from the CUDA source in the engine, or is unknown."""

import pytest

from msn_export.engine.kernels import Kernel, read_accumulators, with_accumulators
from tests.builders.engine_builds import NEEDS_RTX, built
from tests.builders.engine_graphs import Vit

NAME = "_gemm_mha_v2_0xf30343c17e165d7e2b22d671f539cf75"
HEAD = f"\0__global__ void {NAME}(\n    __myln_half* __v1)\n{{"
FP16 = "  __v13.initialize(DATA_TYPE_FP16, DATA_TYPE_FP16, DATA_TYPE_FP16, __v1, __v2);"
BF16 = "  __v13.initialize(DATA_TYPE_BF16, DATA_TYPE_BF16, DATA_TYPE_FP32, __v1, __v2);"
HALVES = "__myln_vtype<__myln_half,8,16>"
FMA = f"FMA<{HALVES}, __myln_float, __myln_vtype<__myln_float,8,32>, __myln_float, 8>::fma(a);"


def attention(tactic: str = NAME) -> Kernel:
    return Kernel("_gemm_mha_v2_myl0_6", "kgen", ("Half",), ("Half",), tactic=tactic)


@NEEDS_RTX
@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0"])
@pytest.mark.parametrize(
    ("vit", "sums"),
    [
        (Vit(), {"fp16": 2}),
        (Vit(dtype="bf16"), {"fp32": 2}),
        (Vit(cls_only=True, heads=4), {"fp16": 1, "fp32": 1}),  # one query: a kernel of its own
        (Vit(dtype="fp32", attention="plain"), {}),
    ],
    ids=str,
)
def test_sums_of_real_engines(vit: Vit, sums: dict, capability: str) -> None:
    if capability == "7.5" and vit.dtype != "fp16":
        pytest.skip("SM 7.5 has no bf16, and TensorRT-RTX no fp32 products for it")
    result = built(vit, capability)
    assert result.census.accumulators == sums
    found = [one for many in read_accumulators(result.output.read_bytes()).values() for one in many]
    assert {name: found.count(name) for name in sorted(set(found))} == sums


@pytest.mark.parametrize(
    ("source", "sums"),
    [
        (HEAD + FP16 + "}\0", "fp16"),
        (HEAD + BF16 + "}\0", "fp32"),
        (HEAD + FMA + "}\0", "fp32"),
        (HEAD + FMA.replace("myln_float,8", "myln_half,8") + "}\0", "fp16"),
        # it ends inside the function
        (HEAD + BF16, "fp32"),
        # two builds of one kernel that do not agree, and sums of two types
        (HEAD + FP16 + "}\0" + HEAD + BF16 + "}\0", "unknown"),
        (HEAD + FMA + FMA.replace("myln_float,8", "myln_half,8") + "}\0", "unknown"),
        (HEAD + FP16.replace("FP16, __v1", "FP64, __v1") + "}\0", "unknown"),
        (HEAD + "}\0" + FP16, "unknown"),  # another function's
        (HEAD + "}" + "extern __global__ void other(" + FP16, "unknown"),
        (HEAD + " " * (1 << 16) + FP16, "unknown"),  # no function is that long
        ("", "unknown"),
    ],
)
def test_what_is_not_told_is_unknown(source: str, sums: str) -> None:
    (kernel,) = with_accumulators([attention()], source.encode())
    assert kernel.accumulator == sums


def test_other_kernels_have_no_sums_of_attention() -> None:
    gemm = Kernel("__myl_FcAdd_myl0_4", "runtime_fusion", ("Half",), ("Half",), tactic=NAME)
    assert with_accumulators([gemm], (HEAD + FP16).encode()) == (gemm,)


def test_any_bytes_may_be_in_an_engine() -> None:
    hostile = (HEAD + "FMA<" * 20_000 + "\xff" + "\0__global__ void _gemm_mha" * 20_000).encode()
    assert read_accumulators(hostile) == {NAME: ["unknown"]}
