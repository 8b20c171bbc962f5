"""An image size that an exporter left dynamic is the one its position embedding has."""

import onnx_ir as ir
import pytest

from msn_export.graph.simplify import fix_image_size
from msn_export.spec import ImageSize
from tests.builders.graphs import parse

STEM = """
g (float[{shape}] x, int64[3] flat) => (float[d,e,f] y)
<float[8,3,4,6] w = {{{weights}}}, float[1,{n},8] pos = {{{positions}}}>
{{
  patches = Conv <strides = [{strides}]> (x, w)
  tokens = Reshape (patches, flat)
  y = Add (tokens, pos)
}}
"""


def input_format(shape: str = "b,c,h,w", n: int = 10, strides: str = "4, 6") -> ir.Model:
    filled = STEM.format(
        shape=shape,
        n=n,
        strides=strides,
        weights=", ".join(["1"] * 576),
        positions=", ".join(["1"] * n * 8),
    )
    return parse(filled)


@pytest.mark.parametrize("shape", ["b,c,h,w", "2,c,h,w", "b,3,h,18", "b,c,12,18"])
def test_height_width_and_channels_are_written_into_the_shape(shape) -> None:
    model = input_format(shape)
    assert fix_image_size(model) == ImageSize(12, 18)  # a grid of 3 by 3 patches, 4 by 6 pixels
    fixed = model.graph.inputs[0].shape
    assert fixed is not None
    assert list(fixed[1:]) == [3, 12, 18]
    assert str(fixed[0]) == shape.split(",")[0]


@pytest.mark.parametrize(
    "model",
    [
        input_format("b,3,12,18"),  # nothing is dynamic
        input_format(n=7),  # 2 by 3, or 3 by 2
        input_format(strides="2, 3"),  # patches that overlap: the grid does not tell the size
        parse("g (float[b,c,h,w] x) => (float[b,c,h,w] y) { y = Relu (x) }"),
    ],
    ids=["fixed", "not square", "overlapping", "no patches"],
)
def test_what_does_not_tell_is_left_as_it_is(model) -> None:
    before = model.graph.inputs[0].shape
    assert fix_image_size(model) is None
    assert model.graph.inputs[0].shape == before
