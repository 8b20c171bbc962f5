"""What a kernel does is told by its name and type; of a product, its weights say the dtype."""

import json

import pytest

from msn_export.engine.census import Census
from msn_export.engine.kernels import (
    Constant,
    Kernel,
    gemm_dtype,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
    read_inspector,
)


def kernel(name: str, kind: str = "kgen", **fields: object) -> Kernel:
    return Kernel(name, kind, **{"inputs": ("Half",), "outputs": ("Half",), **fields})


@pytest.mark.parametrize(
    ("name", "kind", "fused", "gemm", "layout"),
    [
        ("_gemm_mha_v2_myl0_6", "kgen", True, False, False),
        ("_gemv_mha_v1_myl0_15", "kgen", True, False, False),
        ("__mye8037_gemm_mha_v2", "kgen", True, False, False),
        ("encoder.mha.qkv.MatMul_myl0_4", "gemm", False, True, False),
        ("blocks.0._gemm_mha.MatMul_myl0_4", "gemm", False, True, False),
        ("__myl_FcAddCastMean_myl5_249", "runtime_fusion", False, True, False),
        ("__mye30160+__mye30148_myl0_4", "gemm", False, True, False),
        ("__myl_MoveReshTran_myl0_7", "kgen", False, False, True),
        ("__myl_TraRepRes_myl0_7", "kgen", False, False, True),
        ("__myl_MoveReshMulTran_myl0_7", "kgen", False, False, False),
        ("__myl_SlicReshMaxrSubExp_myl0_9", "kgen", False, False, False),
        ("Reformatting CopyNode for Input Tensor 0", "Reformat", False, False, True),
        ("__mye7575_0_myl0_0", "shape_call", False, False, False),
    ],
)
def test_roles(name: str, kind: str, fused: bool, gemm: bool, layout: bool) -> None:
    one = kernel(name, kind)
    assert (is_fused_attention(one), is_gemm(one), is_layout_only(one)) == (fused, gemm, layout)


@pytest.mark.parametrize("words", ["", "_softmaxless_epilogue", "_conv_gemm_mha_v2_reformat"])
def test_a_product_of_full_tensorrt_is_one_whatever_its_tactic_is_called(words: str) -> None:
    layer = {
        "Name": "/encoder/layer.0/MatMul",
        "LayerType": "CaskGemmMatrixMultiply",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
        "TacticName": f"sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x64x64{words}",
    }
    (one,) = read_inspector(json.dumps({"Layers": [layer]}))
    assert is_gemm(one)
    assert not any(role(one) for role in (is_fused_attention, is_convolution, is_layout_only))
    assert Census((one,)).gemm_dtypes == {"Half": 1}


def test_a_product_has_its_weights_dtype_not_its_residuals() -> None:
    weight = Constant("w", "Half", (64, 192))
    bias = Constant("b", "Float", (1, 192))
    fused = kernel("__myl_FcAddAdd_myl0_8", constants=(bias, weight), inputs=("Float", "Half"))
    assert gemm_dtype(fused) == "Half"
    assert gemm_dtype(kernel("p", "gemm", inputs=("Half", "Float"))) == "Float"
    assert gemm_dtype(kernel("p", "gemm", inputs=("Half", "Surprise"))) == "Surprise"
    assert gemm_dtype(kernel("p", "gemm", inputs=())) == "unknown"
