"""The only preprocessing: bit for bit transformers' (Pillow), and the original evaluation's."""

import dataclasses
import io
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from msn_export import image_folder, images
from msn_export.errors import ImageError
from msn_export.preprocessing import RESAMPLING, preset, resized
from msn_export.processor_config import from_processor_config
from msn_export.spec import ImageSize

SMALL = preset("hf", ImageSize(32, 32))
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def picture(height: int = 60, width: int = 80, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Draw a smooth picture with an edge: what resampling filters treat differently."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    drawn = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    drawn.paste((255, 0, 10), (width // 3, height // 4, width // 2 + 1, height // 2 + 1))
    return drawn.convert(mode)


# --- transformers ---------------------------------------------------------------------------------

VIT: dict[str, dict[str, Any]] = {
    **{name: {"resample": code} for code, name in enumerate(RESAMPLING)},
    "not square": {"size": {"height": 24, "width": 40}},
    "no rescale": {"do_rescale": False},
    "another scale": {"rescale_factor": 1 / 127.5},
    "no normalize": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "published": {"size": 32, **IMAGENET},
    "default statistics": {},
}


@pytest.mark.parametrize("config", VIT.values(), ids=VIT.keys())
@pytest.mark.parametrize("shape", [(60, 80), (81, 47), (32, 32), (20, 19), (32, 500)])
def test_floats_are_those_of_transformers_to_the_last_bit(config, shape) -> None:
    config = {"size": {"height": 32, "width": 32}, **config}
    theirs = ViTImageProcessorPil(**config)(picture(*shape), return_tensors="np").pixel_values
    ours = images.preprocess([picture(*shape)], from_processor_config(config, None))
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))


@pytest.mark.parametrize(
    ("edge", "crop"),
    [(40, (32, 32)), (41, (32, 30)), (33, (32, 32)), (20, (32, 32)), (31, (30, 32))],
)
@pytest.mark.parametrize("shape", [(60, 80), (81, 47), (50, 50), (33, 99)])
@pytest.mark.parametrize("code", [2, 3])
def test_a_centre_crop_is_that_of_transformers(edge, crop, shape, code) -> None:
    config = {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": crop[0], "width": crop[1]},
        "do_center_crop": True,
        "resample": code,
        **IMAGENET,
    }
    theirs = CLIPImageProcessorPil(**config)(picture(*shape), return_tensors="np").pixel_values
    ours = images.preprocess([picture(*shape)], from_processor_config(config, None))
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))


def test_the_hf_preset_is_the_published_file(photographs) -> None:
    published = {"do_normalize": True, "do_resize": True, "resample": 2, "size": 224, **IMAGENET}
    processor = ViTImageProcessorPil(**published)
    preprocessing = preset("hf", ImageSize(224, 224))
    for path in image_folder.find(photographs).paths:
        with Image.open(path) as opened:
            theirs = processor(opened.convert("RGB"), return_tensors="np").pixel_values
        np.testing.assert_array_equal(images.preprocess([path], preprocessing), theirs)


# --- the original evaluation: torchvision's Resize(256), CenterCrop(224), ToTensor, Normalize -----


def torchvision_eval(drawn: Image.Image, resize: int, crop: int) -> np.ndarray[Any, Any]:
    """Write out what torchvision's functional.resize, center_crop, to_tensor and normalize do.

    The long side is truncated, ``int(size * long / short)``; the crop's corner is rounded half to
    even, ``int(round((height - crop) / 2.0))``; bytes are divided by 255 in float32.
    """
    width, height = drawn.size
    short, long = (width, height) if width <= height else (height, width)
    new_long = int(resize * long / short)
    new_width, new_height = (resize, new_long) if width <= height else (new_long, resize)
    drawn = drawn.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - crop) / 2.0), round((new_width - crop) / 2.0)
    cut = np.asarray(drawn)[top : top + crop, left : left + crop]
    floats = cut.astype(np.float32) / np.float32(255)
    mean, std = (np.asarray(IMAGENET[f"image_{x}"], np.float32) for x in ("mean", "std"))
    return ((floats - mean) / std).transpose(2, 0, 1)[None]


@settings(max_examples=60)
@given(st.integers(200, 600), st.integers(200, 600))
def test_msn_eval_is_the_original_evaluation(height, width) -> None:
    drawn = picture(height, width)
    ours = images.preprocess([drawn], preset("msn-eval", ImageSize(224, 224)))
    # ToTensor divides by 255, we multiply by 1/255: one unit in the last place of 2.6
    np.testing.assert_allclose(ours, torchvision_eval(drawn, 256, 224), rtol=0, atol=5e-7)


def test_its_crop_rounds_half_to_even_where_transformers_rounds_down() -> None:
    msn = preset("msn-eval", ImageSize(32, 32))  # short side 37: 5 pixels to cut, 2.5 a side
    drawn = picture(37, 39)  # 7 columns to cut, 3.5 a side: 4, and 3 where it is rounded down
    pixels = np.asarray(drawn)
    np.testing.assert_array_equal(images.fit(drawn, msn), pixels[2:34, 4:36])
    config = {"size": {"shortest_edge": 37}, "do_center_crop": True, "crop_size": 32}
    np.testing.assert_array_equal(
        images.fit(drawn, from_processor_config(config, None)), pixels[2:34, 3:35]
    )


# --- shapes and types -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_of_8_bits_becomes_what_the_model_takes(mode, channels) -> None:
    fitted = images.fit(picture(mode=mode), preset("hf", ImageSize(16, 24), channels))
    assert fitted.shape == (16, 24, channels)
    assert fitted.dtype == np.uint8


@settings(max_examples=30)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["hf", "msn-eval"]))
def test_every_size_becomes_the_models(height, width, name) -> None:
    preprocessing = resized(preset(name, ImageSize(32, 32)), ImageSize(16, 24))
    assert images.fit(picture(height, width), preprocessing).shape == (16, 24, 3)


def test_a_batch_is_planes_and_noise_is_bytes() -> None:
    batch = images.preprocess([picture(), picture(50, 50)], SMALL)
    assert batch.shape == (2, 3, 32, 32)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    noise = images.noise(SMALL, 5)
    assert noise.shape == (5, 32, 32, 3)
    assert noise.dtype == np.uint8
    np.testing.assert_array_equal(noise, images.noise(SMALL, 5))
    assert (noise != images.noise(SMALL, 5, seed=1)).any()


# --- EXIF -----------------------------------------------------------------------------------------

IGNORING = dataclasses.replace(SMALL, exif="ignore")
ORIENTATIONS = range(1, 9)


def tagged(path: Path, orientation: int, **options: Any) -> Path:
    """Save a picture that says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_file_is_turned_as_load_image_turns_it(tmp_path, orientation, suffix) -> None:
    path = tagged(tmp_path / f"a{suffix}", orientation)
    theirs = images.fit(load_image(str(path)), SMALL)
    fitted = images.read_file(path, "a", SMALL)
    np.testing.assert_array_equal(fitted.pixels, theirs)
    assert fitted.turned is (orientation != 1)
    np.testing.assert_array_equal(images.read(path, SMALL), theirs)
    with path.open("rb") as file:
        np.testing.assert_array_equal(images.read_file(file, "a", SMALL).pixels, theirs)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_another_picture(tmp_path, orientation) -> None:
    upright = images.read(tagged(tmp_path / "a.png", 1), SMALL)
    turned = images.read(tagged(tmp_path / "b.png", orientation), SMALL)
    assert (turned == upright).all() == (orientation == 1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_opened_image_is_turned_as_load_image_turns_it_and_not_changed(
    tmp_path, orientation
) -> None:
    path = tagged(tmp_path / "a.png", orientation)
    with Image.open(path) as opened, Image.open(path) as theirs:
        got = images.decode([opened, path], SMALL)
        np.testing.assert_array_equal(got[0], images.fit(load_image(theirs), SMALL))
        assert opened.size == (80, 60)
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_file_is_left_as_it_lies_where_exif_is_ignored(tmp_path, orientation) -> None:
    fitted = images.read_file(tagged(tmp_path / "a.png", orientation), "a", IGNORING)
    np.testing.assert_array_equal(fitted.pixels, images.fit(picture(), SMALL))
    assert not fitted.turned


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, orientation) -> None:
    fitted = images.read_file(tagged(tmp_path / "a.png", orientation), "a", SMALL)
    np.testing.assert_array_equal(fitted.pixels, images.fit(picture(), SMALL))
    assert not fitted.turned


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_a_picture_whose_exif_is_damaged_is_read_as_it_lies(tmp_path, exif) -> None:
    picture().save(tmp_path / "a.jpg", exif=exif)
    picture().save(tmp_path / "b.jpg")
    with warnings.catch_warnings():  # Pillow's own, of corrupt EXIF, which is an error in tests
        warnings.simplefilter("ignore", UserWarning)
        damaged = images.read_file(tmp_path / "a.jpg", "a", SMALL)
    np.testing.assert_array_equal(damaged.pixels, images.read(tmp_path / "b.jpg", SMALL))
    assert not damaged.turned


def test_a_bomb_is_not_turned_first(tmp_path, monkeypatch) -> None:
    path = tagged(tmp_path / "a.png", 6)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda _: pytest.fail("it was decoded"))
    with warnings.catch_warnings():  # Pillow's own, which is an error in these tests
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert message_of(path) == "(it has 60x80 pixels; at most 4000 in all are decoded)"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(image_folder.ENDINGS - {".pgm"}))
def test_every_ending_that_is_looked_for_is_read(tmp_path, suffix) -> None:
    path = tmp_path / f"a{suffix}"
    picture().save(path)
    assert images.read(path, SMALL).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, form) for form in images.FORMATS), ("MPO", "JPEG"), ("AVIF", "AVIF")],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_is_told_by_its_first_bytes(form, kind, mode) -> None:
    buffer = io.BytesIO()
    picture(mode=mode).save(buffer, form)
    assert images.kind_of(buffer.getvalue()[: images.HEADER]) == kind


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_and_avif_are_told_by_their_brands(brand) -> None:
    assert images.kind_of(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic") == "HEIC"
    both = b"\0\0\0\x1cftyp" + b"mif1" + b"\0\0\0\0mif1avifmiaf"
    assert images.kind_of(both) == "AVIF"


@pytest.mark.parametrize(
    "content",
    [b"", b"B", b"BM", b"BMW is a maker of cars and not a bitmap", b"P5", b"P5 is a vitamin",
     b"P3\nx", b"RIFF0000WAVEfmt ", b"\0\0\0\x18ftypisom\0\0\0\0mp42", b"%PDF-1.7", b"GIF88a",
     b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0"],
)  # fmt: skip
def test_what_is_no_picture_is_told_by_its_first_bytes(content) -> None:
    assert images.kind_of(content) is None


@given(st.binary(max_size=images.HEADER))
def test_any_first_bytes_are_some_kind_or_none(header) -> None:
    assert images.kind_of(header) in {*images.FORMATS, "AVIF", "HEIC", None}


def test_an_avif_picture_is_read(tmp_path) -> None:
    picture().save(tmp_path / "a.avif")
    assert images.read(tmp_path / "a.avif", SMALL).shape == (32, 32, 3)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_a_picture_that_needs_a_decoder_says_which(tmp_path, monkeypatch) -> None:
    without(monkeypatch, "pillow_heif")
    (tmp_path / "a.jpg").write_bytes(HEIC)
    wanted = "(HEIC picture, which needs pillow-heif (pip install 'msn-export[heic]'))"
    assert message_of(tmp_path / "a.jpg") == wanted
    with pytest.raises(ImageError, match="needs pillow-heif"):
        images.read_file(io.BytesIO(HEIC), "it", SMALL)


def test_heic_is_read_where_its_decoder_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in_for_heif(monkeypatch))
    images._formats.cache_clear()
    (tmp_path / "a.heic").write_bytes(HEIC)
    assert images.unreadable("HEIC") is None
    assert (images.read(tmp_path / "a.heic", SMALL) == (1, 2, 3)).all()
    images._formats.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a package not be there, whether it is installed or not."""
    monkeypatch.setitem(sys.modules, name, None)
    images._formats.cache_clear()


def stand_in_for_heif(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Make a pillow_heif that reads every HEIC as one colour, by the same plug of Pillow's."""

    class Plain(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (40, 30), "RGB"
            self.tile = []

        def load(self) -> Any:
            self.im = Image.new("RGB", self.size, (1, 2, 3)).im
            return super().load()

    def register() -> None:
        accepts = (Plain, lambda prefix: prefix[4:12] == b"ftypheic")
        monkeypatch.setitem(Image.OPEN, "HEIF", accepts)

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = register  # type: ignore[attr-defined]
    return module


def test_a_picture_of_two_cameras_is_read(tmp_path) -> None:
    picture().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture()])
    assert images.read(tmp_path / "a.jpg", SMALL).shape == (32, 32, 3)


def message_of(path: Path, preprocessing: Any = SMALL) -> str:
    with pytest.raises(ImageError) as raised:
        images.read(path, preprocessing)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{path} is not a readable picture ")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_a_file_that_is_none_is_named(tmp_path, content) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert message_of(tmp_path / "a.png").startswith("(")


def test_a_missing_file_is_named(tmp_path) -> None:
    assert "No such file" in message_of(tmp_path / "none.png")


def test_postscript_is_not_opened_whatever_it_is_called(tmp_path) -> None:
    # Pillow would start Ghostscript on it
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    assert message_of(tmp_path / "a.png").startswith("(cannot identify image file")


def test_a_truncated_picture_is_broken(tmp_path) -> None:
    picture().save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in message_of(tmp_path / "a.jpg")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused_and_not_cut_off(tmp_path, dtype) -> None:
    Image.fromarray(np.full((40, 40), 300, dtype)).save(tmp_path / "a.tif")
    assert message_of(tmp_path / "a.tif").startswith("(it has more than 8 bits a channel (mode ")


def test_a_decompression_bomb_is_refused_unopened(tmp_path, monkeypatch) -> None:
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with warnings.catch_warnings():  # Pillow's own, which is an error in these tests
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert message_of(tmp_path / "a.png") == (
            "(it has 60x80 pixels; at most 4000 in all are decoded)"
        )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert "could be decompression bomb" in message_of(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.read(tmp_path / "a.png", SMALL).shape == (32, 32, 3)


def test_a_sliver_that_would_become_a_bomb_is_refused(tmp_path) -> None:
    Image.new("RGB", (1, 20000)).save(tmp_path / "a.png")
    message = message_of(tmp_path / "a.png", preset("msn-eval", ImageSize(224, 224)))
    assert message.startswith("(before its crop it would have 5120000x256 pixels; at most ")


def test_a_picture_of_another_size_is_named_where_nothing_resizes(tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    still = from_processor_config({"do_resize": False, "size": 32}, None)
    assert message_of(tmp_path / "a.png", still) == (
        "(it is 60x80 and preprocessing preprocessor_config.json does not resize; expected 32x32)"
    )
    assert images.fit(picture(32, 32), still).shape == (32, 32, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_anywhere_raises_nothing_else(tmp_path, form) -> None:
    buffer = io.BytesIO()
    picture(20, 30).save(buffer, form)
    whole, generator = buffer.getvalue(), np.random.default_rng(0)
    path = tmp_path / "a.png"
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 300), generator.integers(1, 5)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged[: generator.integers(1, len(whole) + 1)])
        try:
            images.read(path, SMALL)
        except ImageError as error:
            assert str(error).startswith(f"{path} is not a readable picture (")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\] is no picture; give a path, byt"),
        (
            np.zeros((3, 8, 8), np.uint8),
            r"uint8 \[3, 8, 8\] is no picture; .* uint8 \[h, w, 3\] i",
        ),
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\] is no picture"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\] is no picture"),
        (7, "a int is no picture"),
    ],
)
def test_what_is_no_picture_is_told(picture, message) -> None:
    with pytest.raises(ImageError, match=message):
        images.preprocess([picture], SMALL)


def test_no_picture_at_all_is_an_error() -> None:
    with pytest.raises(ImageError, match="no picture to preprocess; give at least one"):
        images.preprocess([], SMALL)
