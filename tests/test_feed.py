"""What an artifact takes is read off its input, and what had to be assumed is said."""

import numpy as np
import pytest

from msn_export import images
from msn_export.errors import GraphError, ManifestError, SpecError
from msn_export.feed import feed_of
from msn_export.onnx_header import UNSEALED, GraphMetadata
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize, InputFormat, TensorSpec

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)


def spec(dtype: str, *shape: int | str) -> tuple[TensorSpec, ...]:
    return (TensorSpec("x", dtype, shape),)


def test_planes_are_normalised_and_typed_as_the_graph_is() -> None:
    for dtype, kind in (("float", np.float32), ("float16", np.float16)):
        feed = feed_of("m", spec(dtype, "b", 3, 32, 48), None)
        assert feed.input_format is InputFormat(dtype)
        wanted = images.normalize(PIXELS, preset("hf", ImageSize(32, 48))).astype(kind)
        np.testing.assert_array_equal(feed(PIXELS), wanted)
        assert feed(PIXELS).dtype == kind


def test_metadata_of_the_file_is_taken_and_said(tmp_path) -> None:
    own = GraphMetadata(preset("msn-eval", ImageSize(32, 48)))
    feed = feed_of("m", spec("float", "b", 3, 32, 48), own)
    assert feed.preprocessing == own.preprocessing
    assert feed.notes == (UNSEALED,)
    bare = feed_of("m", spec("float", "b", 3, 32, 48), GraphMetadata())
    assert bare.notes == (UNSEALED, *bare.preprocessing.notes)
    for wrong in (spec("float", "b", 1, 32, 48), spec("float", "b", 3, 48, 32)):
        with pytest.raises((SpecError, ManifestError), match=r"its own metadata|do not fit"):
            feed_of("m", wrong, own)


def test_bytes_stay_bytes() -> None:
    feed = feed_of("m", spec("uint8", "b", 32, 48, 3), None)
    assert feed(PIXELS) is PIXELS
    assert feed.preprocessing.size == ImageSize(32, 48)


def test_open_sides_are_taken_from_what_is_given() -> None:
    feed = feed_of("m", spec("float", "b", "c", "h", "w"), None, size=ImageSize(32, 48))
    assert feed.preprocessing.size == ImageSize(32, 48)
    assert feed.preprocessing.channels == 3


def test_a_preset_that_was_chosen_is_no_assumption() -> None:
    assumed = feed_of("m", spec("float", "b", 3, 224, 224), None)
    chosen = feed_of("m", spec("float", "b", 3, 224, 224), None, preprocess="msn-eval")
    (note,) = assumed.notes
    assert note.startswith("preprocessing hf was assumed: nothing says how")
    assert chosen.notes == ()
    assert chosen.preprocessing.short_side == 256


def test_exif_is_applied_unless_it_is_chosen_or_known_otherwise() -> None:
    inputs = spec("float", "b", 3, 224, 224)
    assert feed_of("m", inputs, None).preprocessing.exif == "apply"
    assert feed_of("m", inputs, None, exif="ignore").preprocessing.exif == "ignore"


def test_another_normalisation_than_the_one_inside_is_refused() -> None:
    inputs = spec("uint8", "b", 224, 224, 3)
    assert feed_of("m", inputs, None, preprocess="raw").preprocessing.name == "raw"


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), GraphError, "takes nothing; expected one image input"),
        (spec("int64", "b", 9), GraphError, r"input 'x' is int64\['b', 9\]; expected float"),
        (spec("float", "b", 3, "h", "w"), SpecError, "--image-size says them"),
    ],
)
def test_what_is_no_image_input_is_named(inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        feed_of("m", inputs, None)
