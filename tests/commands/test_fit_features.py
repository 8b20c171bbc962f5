"""The pictures of a fit, and the folder that keeps their features until it is done."""

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest

from msn_export.commands.fit_features import FeatureRows, FitPictures, hash_of, work_folder
from msn_export.commands.fit_job import FitJob
from msn_export.embedding.growing_array import GrowingArray
from msn_export.errors import GraphError, ImageError, OutputError
from msn_export.labelled import read_labelled
from tests.builders.labelled import noise

ORIGIN = {"features": "msn", "pictures": "8, sha256 ab"}


def job(folder: Path, **options: object) -> FitJob:
    return FitJob("random:vit-msn-small", labelled=folder, **options)


def test_without_shots_every_picture_is_trained_on(tmp_path) -> None:
    found = FitPictures.of(job(noise(tmp_path, each=3, classes=2)))
    assert [rows.tolist() for rows in found.draws] == [[0, 1, 2, 3, 4, 5]]
    assert found.test is None


def test_draws_of_shots_differ_and_hold_every_class(tmp_path) -> None:
    found = FitPictures.of(job(noise(tmp_path, each=9, classes=3), shots=2))
    assert len(found.draws) == 3
    assert len({tuple(rows) for rows in found.draws}) == 3
    for rows in found.draws:
        assert np.bincount(found.labelled.labels[rows]).tolist() == [2, 2, 2]
    assert len(found.labelled) == 27  # those not drawn measure the accuracy


def test_beside_a_test_set_the_drawn_pictures_alone_are_run(tmp_path) -> None:
    folder = noise(tmp_path / "train", each=9, classes=3)
    whole = FitPictures.of(job(folder, shots=2, draws=2))
    test = noise(tmp_path / "test", each=1, classes=3, first=300)
    found = FitPictures.of(job(folder, shots=2, draws=2, test=test))
    drawn = sorted({int(row) for rows in whole.draws for row in rows})
    assert len(found.labelled) == len(drawn) < 27
    for wanted, rows in zip(whole.draws, found.draws, strict=True):
        paths = [found.labelled.paths[row] for row in rows]
        assert paths == [whole.labelled.paths[row] for row in wanted]


def test_a_test_set_has_classes_of_the_training_set_and_no_picture_of_it(tmp_path) -> None:
    folder = noise(tmp_path / "train", each=3, classes=2)
    with pytest.raises(ImageError) as error:
        FitPictures.of(job(folder, test=folder))
    assert str(error.value) == (
        f"all 6 pictures of --test {folder} are among those of {folder}; give others, or leave "
        "--test out"
    )
    other = noise(tmp_path / "test", each=5, classes=3)
    with pytest.raises(ImageError, match=r"has 1 class \(class 00002\) that .*train lacks"):
        FitPictures.of(job(folder, test=other))


def test_the_hash_is_of_names_classes_and_sizes(tmp_path) -> None:
    folder = noise(tmp_path / "set", each=2, classes=2)
    before = hash_of(read_labelled(folder))
    assert hash_of(read_labelled(folder.rename(tmp_path / "moved"))) == before
    path = next((tmp_path / "moved").rglob("*.png"))
    (tmp_path / "moved" / "class 00000").rename(tmp_path / "moved" / "other")
    assert hash_of(read_labelled(tmp_path / "moved")) != before
    (tmp_path / "moved" / "other").rename(tmp_path / "moved" / "class 00000")
    assert hash_of(read_labelled(tmp_path / "moved")) == before
    path.write_bytes(path.read_bytes() + b"\0")
    assert hash_of(read_labelled(tmp_path / "moved")) != before


def test_the_folder_is_gone_at_the_end(tmp_path) -> None:
    folder = tmp_path / "m.onnx.fit"
    with work_folder(folder, ORIGIN, force=False) as inside:
        (inside / "training.npy.parts").mkdir()
        assert json.loads((inside / "fit.json").read_text()) == ORIGIN
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ImageError, GraphError, KeyboardInterrupt])
@pytest.mark.parametrize("rows", [True, False])
def test_rows_outlive_what_is_not_the_fault_of_the_pictures(tmp_path, error, rows) -> None:
    folder = tmp_path / "m.onnx.fit"

    def fail() -> None:
        with work_folder(folder, ORIGIN, force=False) as inside:
            if rows:
                (inside / "training.npy.parts").mkdir()
            raise error

    with pytest.raises(error):
        fail()
    assert folder.exists() == (rows and error is not ImageError)


def left(tmp_path: Path) -> Path:
    """Leave the folder of a run that was interrupted."""
    folder = tmp_path / "m.onnx.fit"

    def interrupted() -> None:
        with work_folder(folder, ORIGIN, force=False) as inside:
            (inside / "training.npy.parts").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    return folder


@pytest.mark.parametrize("force", [True, False])
def test_the_same_run_finds_it_again(tmp_path, force) -> None:
    folder = left(tmp_path)
    with work_folder(folder, ORIGIN, force=force) as inside:
        assert (inside / "training.npy.parts").is_dir()


def test_another_run_refuses_it_or_starts_over(tmp_path) -> None:
    folder = left(tmp_path)
    other = {**ORIGIN, "features": "embedding"}
    with pytest.raises(OutputError) as error, work_folder(folder, other, force=False):
        pass
    assert str(error.value) == (
        f"{folder} keeps an interrupted run with another features (msn, now embedding); --force "
        "starts over, -o writes elsewhere"
    )
    assert (folder / "training.npy.parts").is_dir()
    with work_folder(folder, other, force=True) as inside:
        assert sorted(path.name for path in inside.iterdir()) == ["fit.json", "lock"]


@pytest.mark.parametrize("force", [True, False])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, force) -> None:
    folder = tmp_path / "m.onnx.fit"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with (
        pytest.raises(OutputError, match="is not a folder of this command"),
        work_folder(folder, ORIGIN, force=force),
    ):
        pass
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_record_that_was_cut_short_is_written_again(tmp_path) -> None:
    folder = tmp_path / "m.onnx.fit"
    folder.mkdir()
    (folder / "fit.json.partial").write_text('{"feat')
    with work_folder(folder, ORIGIN, force=False) as inside:
        assert json.loads((inside / "fit.json").read_text()) == ORIGIN


def test_two_runs_do_not_share_it(tmp_path) -> None:
    folder = left(tmp_path)
    lock = os.open(folder / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with (
        pytest.raises(OutputError, match=r"another run is writing .*m\.onnx\.fit; wait for it"),
        work_folder(folder, ORIGIN, force=True),
    ):
        pass
    os.close(lock)
    assert (folder / "training.npy.parts").is_dir()


@pytest.mark.parametrize("chunk", [2**20, 24, 1])
def test_rows_are_read_a_part_at_a_time(tmp_path, monkeypatch, chunk) -> None:
    monkeypatch.setattr("msn_export.commands.fit_features._CHUNK", chunk)
    labelled = read_labelled(noise(tmp_path / "set", each=5, classes=2))
    held = np.random.default_rng(0).standard_normal((10, 8), np.float32)
    array = GrowingArray(tmp_path / "rows.npy", 10)
    array.write(0, held)
    features = FeatureRows(labelled, array, 8, {3: "broken", 9: "broken"}, 0)
    assert features.readable(np.arange(10)).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert features.readable(np.array([3, 9])).tolist() == []
    rows = np.array([0, 4, 5, 8])
    taken = features.taken(rows)
    assert taken.dtype == np.float64
    np.testing.assert_array_equal(taken, held[rows])
    parts = list(features.parts(rows))
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), held[rows])
    assert len(parts) == {2**20: 1, 24: 3, 1: 4}[chunk]
