"""What a census says of real engines, of recorded ones, and what it refuses."""

import json
from dataclasses import replace

import pytest

from msn_export.engine.census import AskedNode, Census, require, summary
from msn_export.engine.kernels import Constant, Kernel, is_gemm
from msn_export.errors import BuildError, ManifestError
from msn_export.schema import from_plain, to_plain
from tests.builders.engine_builds import built
from tests.builders.engine_graphs import Vit


def names(kernels: tuple[Kernel, ...]) -> list[str]:
    return [kernel.name for kernel in kernels]


# Figures of TensorRT-RTX 1.7.1 for a ViT of two blocks; each block has four matrix products.
@pytest.mark.parametrize(
    ("vit", "capability", "kernels", "fused", "gemms", "convolutions"),
    [
        (Vit(), "8.9", 22, 2, {"Half": 8}, {"Half": 1}),
        (Vit(), "7.5", 22, 2, {"Half": 8}, {"Half": 1}),
        (Vit(), "12.0", 22, 2, {"Half": 8}, {"Half": 1}),
        (Vit(dtype="bf16"), "8.9", 22, 2, {"BFloat16": 8}, {"BFloat16": 1}),
        (Vit(quantised="int8"), "8.9", 24, 2, {"Int8": 8}, {"Half": 1}),
        (Vit(quantised="fp8"), "8.9", 24, 2, {"FP8": 8}, {"Half": 1}),
        (Vit(attention="plain"), "8.9", 25, 2, {"Half": 8}, {"Half": 1}),
        # one query a head: a kernel of its own, from 4 heads x images on
        (Vit(cls_only=True, heads=4), "8.9", 22, 2, {"Half": 8}, {"Half": 1}),
        # q k and p v are products of their own where attention is not fused
        (Vit(dtype="fp32", attention="plain"), "8.9", 38, 0, {"Float": 12}, {"Float": 1}),
        (Vit(attention="float"), "8.9", 30, 0, {"Half": 8, "Float": 4}, {"Half": 1}),
    ],
    ids=str,
)
def test_figures_of_real_engines(
    vit: Vit, capability: str, kernels: int, fused: int, gemms: dict, convolutions: dict
) -> None:
    census = built(vit, capability).census
    assert len(census.kernels) == kernels
    assert len(census.fused_attention) == fused
    assert census.gemm_dtypes == gemms
    assert census.convolution_dtypes == convolutions
    assert list(census.kernels_per_block) == [0, 1]
    assert census.closed == ()


def test_kernels_belong_to_blocks() -> None:
    census = built(Vit()).census
    assert census.kernels_per_block == {0: 9, 1: 10}
    outside = [kernel for kernel in census.kernels if kernel.block is None]
    assert [kernel.kind for kernel in outside] == ["shape_call", "kgen", "correlation"]
    assert [kernel.block for kernel in census.fused_attention] == [0, 1]


def test_layout_only_kernels_are_named_with_their_place() -> None:
    census = built(Vit()).census
    assert [(kernel.name[:20], kernel.block) for kernel in census.layout_only] == [
        ("__myl_MoveReplConc_m", None),
        ("__myl_MoveReshTran_m", 0),
        ("__myl_MoveReshTran_m", 1),
    ]
    told = summary(census)["layout_only"]
    assert told[1]["layers"] == ["blocks.0.attn.Attention", "blocks.0.attn.merge.Transpose"]


@pytest.mark.parametrize(
    "name",
    ["/vit/encoder/layer.{block}/{part}", "/layers.{block}/{part}", "enc.block_{block}.{part}"],
)
def test_blocks_of_foreign_graphs_are_found(name: str) -> None:
    census = built(Vit(name=name)).census
    assert census.kernels_per_block == {0: 9, 1: 10}
    require(census, depth=2, precision="fp16")


def test_a_graph_without_block_names_is_judged_as_a_whole() -> None:
    census = built(Vit(name="n{block}_{part}")).census
    assert census.kernels_per_block == {}
    require(census, depth=2, precision="fp16")
    with pytest.raises(BuildError, match="fused attention in 2 of 3 blocks; --allow-unfused"):
        require(census, depth=3, precision="fp16")


def test_each_profile_has_its_own_census() -> None:
    first, second = built(Vit(), profiles="1:8:32 64:64:128").censuses
    assert (first.profile, second.profile) == (0, 1)
    assert len(first.kernels) == len(second.kernels) == 22
    for census in (first, second):
        require(census, depth=2, precision="fp16")
    with pytest.raises(BuildError, match=r"not what was asked for \(profile 1\): fused attention"):
        require(second, depth=3, precision="fp16")


def test_several_targets_are_one_set_of_kernels() -> None:
    both = built(Vit(), "8.9 12.0")
    assert len(both.censuses) == 1
    assert names(both.census.kernels) == names(built(Vit(), "8.9").census.kernels)


def test_a_fixed_batch_saves_the_shape_computation() -> None:
    assert "shape_call" in built(Vit()).census.by_kind
    fixed = built(Vit(batch=4), profiles="4")
    assert "shape_call" not in fixed.census.by_kind
    assert len(fixed.census.kernels) == 21


@pytest.mark.parametrize(
    "vit",
    [Vit(input="fp32"), Vit(input="fp32", output="fp32"), Vit(input="uint8", output="fp32")],
    ids=str,
)
def test_converting_input_and_output_costs_no_kernel(vit: Vit) -> None:
    assert len(built(vit).census.kernels) == len(built(Vit()).census.kernels)


def test_weights_by_dtype() -> None:
    vit = Vit()
    dim, patch = vit.dim, 4 * vit.patch**2  # the convolution's three channels are padded to four
    blocks = vit.depth * (dim * 12 * dim + 13 * dim)  # four products; biases and norms
    halves = 2 * (blocks + dim * patch)
    assert built(vit).census.weight_bytes["Half"] == pytest.approx(halves, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("Float", 60), ("Half", 30), ("BFloat16", 30), ("Int8", 15), ("FP8", 15), ("Int64", 120),
     ("Int4", 8)],
)  # fmt: skip
def test_a_weight_takes_the_bytes_of_its_elements(dtype, size) -> None:
    assert Constant("w", dtype, (3, 5)).bytes == size


def test_census_survives_json() -> None:
    census = built(Vit(quantised="int8")).census
    assert from_plain(Census, json.loads(json.dumps(to_plain(census))), "census") == census
    with pytest.raises(ManifestError, match=r"census\.kernels is missing"):
        from_plain(Census, {"profile": 0}, "census")


# --- what require() refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vit", "precision"),
    [(Vit(), "fp16"), (Vit(dtype="bf16"), "bf16"), (Vit(quantised="int8"), "int8"),
     (Vit(quantised="fp8"), "fp8")],
    ids=str,
)  # fmt: skip
def test_what_was_asked_for_passes(vit: Vit, precision: str) -> None:
    require(built(vit).census, depth=2, precision=precision)


def test_unfused_attention_is_refused_unless_allowed() -> None:
    census = built(Vit(dtype="fp32", attention="plain")).census
    with pytest.raises(
        BuildError,
        match=r"^engine is not what was asked for: fused attention in 0 of 2 blocks "
        r"\(none in block 0, 1\); --allow-unfused accepts that$",
    ):
        require(census, depth=2, precision="fp32")
    require(census, depth=2, precision="fp32", allow_unfused=True)


def test_one_unfused_block_is_named() -> None:
    census = built(Vit()).census
    kept = tuple(kernel for kernel in census.kernels if kernel is not census.fused_attention[1])
    with pytest.raises(BuildError, match=r"1 of 2 blocks \(none in block 1\)"):
        require(replace(census, kernels=kept), depth=2, precision="fp16")


def test_products_of_another_precision_are_named() -> None:
    census = built(Vit(attention="float")).census
    with pytest.raises(
        BuildError,
        match=r"^engine is not what was asked for: 4 of 12 matrix products and attention kernels "
        r"are not Half: Float in blocks\.0\.attn\.scores\.MatMul.*, Float in .* and 1 more$",
    ):
        require(census, depth=2, precision="fp16", allow_unfused=True)


def test_islands_may_stay_in_fp32() -> None:
    census = built(Vit(attention="float")).census
    asked = {
        f"blocks.{block}.attn.{part}.MatMul": AskedNode(fp32=True, product=True)
        for block in range(2)
        for part in ("scores", "values")
    }
    require(census, depth=2, precision="fp16", allow_unfused=True, asked=asked)
    del asked["blocks.1.attn.scores.MatMul"], asked["blocks.1.attn.values.MatMul"]
    with pytest.raises(BuildError, match="2 of 12 matrix products"):
        require(census, depth=2, precision="fp16", allow_unfused=True, asked=asked)


def test_a_product_is_no_island_because_the_addition_after_it_is() -> None:
    census = built(Vit(attention="float")).census
    asked = {
        layer: AskedNode(fp32=True)
        for kernel in census.gemms
        for layer in kernel.layers
        if kernel.inputs[0] == "Float"
    }
    with pytest.raises(BuildError, match="4 of 12 matrix products"):
        require(census, depth=2, precision="fp16", allow_unfused=True, asked=asked)


def test_attention_in_bf16_is_what_the_graph_asks_for_and_sums_in_fp32() -> None:
    census = built(Vit()).census
    other = built(Vit(dtype="bf16")).census.fused_attention[1]
    kernels = tuple(other if k is census.fused_attention[1] else k for k in census.kernels)
    mixed = replace(census, kernels=kernels)
    with pytest.raises(BuildError, match=r"are not Half: BFloat16 in blocks\.1\.attn\.Attention"):
        require(mixed, depth=2, precision="fp16")
    asked = {"blocks.1.attn.Attention": AskedNode(fp32=False, bf16=True, product=True)}
    require(mixed, depth=2, precision="fp16", asked=asked)
    with pytest.raises(
        BuildError,
        match=r"blocks\.1\.attn\.Attention is typed bf16, and its kernel sums in fp16",
    ):
        require(census, depth=2, precision="fp16", asked=asked)


def test_an_unquantised_engine_is_not_int8() -> None:
    with pytest.raises(BuildError, match="no matrix product multiplies in Int8; is the graph qua"):
        require(built(Vit()).census, depth=2, precision="int8")


def test_each_quantised_product_must_multiply_in_8_bits() -> None:
    census = built(Vit(quantised="int8")).census
    products = [kernel.layers[0] for kernel in census.gemms]
    require(census, depth=2, precision="int8", quantised=products)
    for wrong, more in ((["a"], ""), (["a", "b", "c"], ""), (["a", "b", "c", "d"], " and 1 more")):
        named = ", ".join(f"no kernel for {name}" for name in wrong[:3])
        count = f"8 of {8 + len(wrong)} quantised products multiply in Int8: {named}{more}$"
        with pytest.raises(BuildError, match=count):
            require(census, depth=2, precision="int8", quantised=[*products, *wrong])


def test_of_islands_that_are_none_three_are_named() -> None:
    census = built(Vit()).census
    products = [name for kernel in census.gemms for name in kernel.layers if "MatMul" in name]
    said = "; ".join(
        f"{name} multiplies in Half, and the graph asks for fp32" for name in products[:3]
    )
    for count, more in ((3, ""), (4, "; and 1 more such")):
        asked = {name: AskedNode(fp32=True, product=True) for name in products[:count]}
        with pytest.raises(BuildError, match=f": {said}{more}$"):
            require(census, depth=2, precision="fp16", asked=asked)


def test_products_that_are_not_recognised_prove_nothing() -> None:
    census = built(Vit()).census
    none = tuple(kernel for kernel in census.kernels if not is_gemm(kernel))
    with pytest.raises(BuildError, match="no matrix product is recognised, so their precision"):
        require(replace(census, kernels=none), depth=2, precision="fp16")
    some = tuple(k for k in census.kernels if not (is_gemm(k) and k.block == 1))
    with pytest.raises(BuildError, match="no matrix product is recognised in block 1, so"):
        require(replace(census, kernels=some), depth=2, precision="fp16")


def test_a_closed_layer_proves_nothing() -> None:
    layer = Kernel("{ForeignNode[patch.Conv...norm]}", "Myelin", ("Half",), ("Half",))
    census = Census((layer,))
    assert census.closed == (layer,)
    with pytest.raises(BuildError, match=r"are not proven: TensorRT does not tell what is inside"):
        require(census, depth=2, precision="fp16")
    require(census, depth=2, precision="fp16", allow_unfused=True)
