"""The two 8-bit formats hold what their sources say, and a scale is a number its graph can hold."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.calibration.qdq import FP8, INT8, scales
from msn_export.errors import GraphError
from msn_export.spec import Dtype

BASES = {Dtype.FP32: np.float32, Dtype.FP16: np.float16, Dtype.BF16: ml_dtypes.bfloat16}


def test_int8_is_symmetric_and_saturates() -> None:
    got = INT8.encode(np.array([-1000.0, -127.6, -0.5, 0.5, 1.5, 127.4, 1000.0]))
    assert got.dtype == np.int8
    assert got.tolist() == [-127, -127, 0, 0, 2, 127, 127]  # half to even, as ONNX rounds


def test_fp8_is_e4m3_and_saturates() -> None:
    # arXiv 2209.05433, table 1: largest 448, smallest normal 2**-6, smallest subnormal 2**-9
    got = FP8.encode(np.array([1e9, -1e9, 448.0, 2.0**-6, 2.0**-9, 2.0**-11, 1.0625]))
    assert got.astype(np.float32).tolist() == [448, -448, 448, 2.0**-6, 2.0**-9, 0, 1.0]


@pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
def test_carrying_is_the_nearest_number_of_the_format(form) -> None:
    scale = 0.01
    numbers = np.arange(256, dtype=np.uint8).view(form.onnx.numpy()).astype(np.float32)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) <= form.largest)] * np.float32(scale)
    x = np.random.default_rng(0).uniform(numbers.min(), numbers.max(), 1000).astype(np.float32)
    nearest = np.abs(numbers[:, None] - x).min(axis=0)
    np.testing.assert_allclose(np.abs(form.carry(x, scale) - x), nearest, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
@given(limit=st.floats(2.0**-20, 2.0**20))
def test_a_scale_is_held_by_the_base_and_cuts_nothing_off(form, base, limit) -> None:
    scale = scales(limit, form, base)
    assert scale.dtype == np.float32
    assert scale == scale.astype(BASES[base]).astype(np.float32)
    assert float(scale) * form.largest >= limit * (1 - 1e-6)  # 1e-6: scales are float32
    # a step of fp16 or bf16, where it is not subnormal (2**-14 at 10 bits)
    assert float(scale) <= max(limit / form.largest * (1 + 2**-7), limit / form.largest + 2**-24)


def test_a_channel_that_is_zero_has_scale_one() -> None:
    assert scales(np.array([0.0, 127.0]), INT8, Dtype.FP16).tolist() == [1.0, 1.0]


def test_a_range_whose_scale_passes_the_base_is_refused() -> None:
    with pytest.raises(
        GraphError, match=r"needs a scale of 7.87e\+05, which fp16 does not hold; cal"
    ):
        scales(1e8, INT8, Dtype.FP16)
    assert np.isfinite(scales(1e8, INT8, Dtype.BF16))
