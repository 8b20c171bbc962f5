"""Images are dealt by seed: none is both calibrated on and held out, broken ones are named."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from msn_export import images
from msn_export.calibration.images import HELD_OUT_MOST, Pictures, Split, hash_of, split
from msn_export.errors import ImageError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize, InputFormat
from tests.builders.tiny_artifacts import pictures

SMALL = preset("hf", ImageSize(8, 8))


def dealt(folder: Path, *, limit: int = 512, seed: int = 0, taken=()) -> Split:
    return split(folder, SMALL, InputFormat.UINT8, limit=limit, seed=seed, taken=taken)


def calibrated(found: Split) -> list[str]:
    """Decode what is calibrated on, and give the hashes."""
    for _ in found.calibration.decode(5):
        pass
    return list(found.calibration.seen.values())


def held_out(found: Split) -> list[str]:
    return [hash_of(pixels) for pixels in found.held_out.pixels]


def test_one_in_four_is_held_out_and_none_of_them_is_calibrated_on(tmp_path) -> None:
    found = dealt(pictures(tmp_path, 21))
    assert len(found.held_out.pixels) == 5
    hashes = calibrated(found)
    assert len(hashes) == 16
    assert not set(hashes) & set(held_out(found))


def test_no_more_are_held_out_than_a_verdict_needs(tmp_path) -> None:
    found = dealt(pictures(tmp_path, 4 * HELD_OUT_MOST + 40))
    assert len(found.held_out.pixels) == HELD_OUT_MOST == 64


def test_the_seed_chooses_and_the_same_seed_the_same(tmp_path) -> None:
    folder = pictures(tmp_path, 20)
    first, again, other = (dealt(folder, limit=6, seed=seed) for seed in (0, 0, 1))
    assert calibrated(first) == calibrated(again)
    assert len(calibrated(first)) == 6
    assert first.held_out.names == again.held_out.names
    assert set(calibrated(first)) != set(calibrated(other))


def test_names_say_which_folder(tmp_path) -> None:
    for name in dealt(pictures(tmp_path, 8)).held_out.names:
        assert (tmp_path / name).is_file()


def test_the_same_picture_twice_is_never_on_both_sides(tmp_path) -> None:
    folder = pictures(tmp_path, 12)
    for path in sorted(folder.rglob("*.png")):
        for copy in range(2):
            shutil.copy(path, path.with_name(f"copy-{copy}-{path.name}"))
    for seed in range(5):
        found = dealt(folder, seed=seed)
        assert not set(calibrated(found)) & set(held_out(found))
        assert len(set(held_out(found))) == len(held_out(found))


def test_broken_ones_are_named_counted_and_replaced(tmp_path) -> None:
    folder = pictures(tmp_path, 20, broken=(3, 4, 5))
    found = dealt(folder, limit=10)
    assert len(calibrated(found)) == 10
    everything = dealt(folder)
    assert len(calibrated(everything)) + len(everything.held_out.pixels) == 17
    assert {path.name for path in everything.calibration.broken} == {
        "003.png",
        "004.png",
        "005.png",
    }
    assert all("is not a readable picture" in why for why in everything.calibration.broken.values())


def test_images_of_known_ranges_are_not_held_out(tmp_path) -> None:
    folder = pictures(tmp_path, 12)
    taken = calibrated(dealt(folder, seed=0))
    for seed in range(5):
        found = dealt(folder, seed=seed, taken=taken)
        assert held_out(found)
        assert not set(held_out(found)) & set(taken)


def test_nothing_to_judge_by_is_refused(tmp_path) -> None:
    folder = pictures(tmp_path, 6)
    every = [hash_of(images.read(path, SMALL)) for path in folder.rglob("*.png")]
    with pytest.raises(
        ImageError, match=r"every picture of .* was calibrated on before, by --ranges; give others"
    ):
        dealt(folder, taken=every)


@pytest.mark.parametrize(
    ("count", "broken", "message"),
    [
        (0, (), "image folder .* holds no picture that can be read"),
        (
            1,
            (),
            "has too few readable pictures; expected two or more that differ, to calibrate on one",
        ),
        (2, (0,), "has too few readable pictures; expected two or more"),
        (3, (0, 1, 2), r"all 3 pictures of .* are broken; the first: .* is not a readable picture"),
    ],
    ids=["none", "one", "one whole", "all broken"],
)
def test_too_few_pictures_are_refused(tmp_path, count, broken, message) -> None:
    with pytest.raises(ImageError, match=message):
        dealt(pictures(tmp_path, count, broken))


def test_pictures_that_are_all_the_same_are_one(tmp_path) -> None:
    (original,) = pictures(tmp_path, 1).rglob("*.png")
    shutil.copy(original, original.with_name("copy.png"))
    with pytest.raises(ImageError, match="has too few readable pictures; expected two or more"):
        dealt(tmp_path)


def test_they_are_decoded_when_they_are_asked_for_and_no_earlier(tmp_path, monkeypatch) -> None:
    read: list[Path] = []
    whole = images.read_file

    def counted(path, name, preprocessing):
        read.append(path)
        return whole(path, name, preprocessing)

    monkeypatch.setattr(images, "read_file", counted)
    found = Pictures(sorted(pictures(tmp_path, 20).rglob("*.png")), SMALL, InputFormat.UINT8, 20)
    for _ in itertools.islice(found.decode(4), 2):
        pass
    assert len(read) == 8


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_graph_gets_what_every_other_command_feeds_it(tmp_path, batch) -> None:
    paths = sorted(pictures(tmp_path, 7).rglob("*.png"))
    as_bytes, as_floats = (
        np.concatenate([part for part, _ in Pictures(paths, SMALL, input_format, 7).batches(batch)])
        for input_format in (InputFormat.UINT8, InputFormat.FLOAT)
    )
    np.testing.assert_array_equal(as_bytes, images.decode(paths, SMALL))
    np.testing.assert_array_equal(as_floats, images.preprocess(paths, SMALL))
