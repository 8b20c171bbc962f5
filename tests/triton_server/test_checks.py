"""A hostile configuration: no file outside its folder is opened for it, and none hangs a check."""

import os
import time

import pytest

from tests.builders.triton_runs import wrong
from tests.contracts.triton_faults import write_base

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def test_a_fault_is_reported_once_and_alone(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    (folder / "labels.txt").write_text("cat\ndog\na bird\nfish\n")
    assert len(wrong(tmp_path / "repo")) == 4  # the count and the names, in each configuration


def test_a_type_or_a_name_that_nobody_knows_is_a_finding_like_others(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    config = folder / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("data_type: TYPE_FP32", "data_type: 99", 1))
    assert any("99" in line for line in wrong(tmp_path / "repo"))
    config.write_text(f'{text}default_model_filename: "{"x" * 300}"\n')
    found = wrong(tmp_path / "repo")
    assert any("… cannot be looked up: File name too long" in line for line in found), found


@pytest.mark.parametrize("place", ["1/model.onnx", "labels.txt", "config.pbtxt"])
def test_a_link_that_leads_out_of_the_repository_is_not_followed(place, tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    secret = tmp_path / "secret"
    (folder / place).rename(secret)
    (folder / place).symlink_to(secret)
    assert any(
        "is a link that leads out of the repository" in line for line in wrong(folder.parent)
    )


def test_a_pipe_in_a_files_place_does_not_hang_the_check(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    for place in ("config.pbtxt", "labels.txt", "configs/gpu.pbtxt", "1/model.onnx"):
        (folder / place).unlink()
        os.mkfifo(folder / place)
    started = time.monotonic()
    assert wrong(tmp_path / "repo")
    assert time.monotonic() - started < 5
