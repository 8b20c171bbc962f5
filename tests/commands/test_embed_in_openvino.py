"""``msn-export embed --providers openvino``: batches under way change no row, nor their order."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msn_export.embedding.inference import LocalExecutor
from msn_export.runtime.openvino import VERSION, OpenVinoRunner
from msn_export.runtime.runner import Runner
from tests.builders.embeds import BROKEN, COUNT, embed
from tests.builders.tiny_artifacts import classifier, pictures
from tests.runtime.test_openvino import needs_bf16


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("embed"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, BROKEN)


def rows(output: Path) -> np.ndarray:
    found: np.ndarray = np.load(output)
    return found


def in_openvino(model: Path, folder: Path, output: Path, *options: str) -> dict[str, object]:
    result = embed(model, folder, output, "--providers", "openvino", "--json", *options)
    assert result.exit_code == 0, result.output
    told: dict[str, object] = json.loads(result.stdout)
    return told


def test_the_rows_are_those_of_single_calls_and_onnxruntimes(
    model, folder, tmp_path, monkeypatch
) -> None:
    told = in_openvino(model, folder, tmp_path / "async.npy")
    assert told["runner"] == f"OpenVINO {VERSION}, CPU"
    assert told["precision"] == {
        "products": {"fp32": 10}, "attention": {"fp32": 2}, "quantised": None,
    }  # fmt: skip
    assert (told["images"], told["broken"]) == (COUNT, len(BROKEN))
    assert "selftest passed" in str(told["selftest"])
    monkeypatch.setattr(OpenVinoRunner, "map", Runner.map)
    in_openvino(model, folder, tmp_path / "sync.npy")
    assert (tmp_path / "async.npy").read_bytes() == (tmp_path / "sync.npy").read_bytes()
    assert embed(model, folder, tmp_path / "ort.npy", "--providers", "cpu").exit_code == 0
    found, wanted = rows(tmp_path / "async.npy"), rows(tmp_path / "ort.npy")
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # order of additions, 2e-6 measured
    lines = [(tmp_path / f"{name}.npy.rows.jsonl").read_text() for name in ("async", "ort")]
    assert [json.loads(one)["path"] for one in lines[0].splitlines()] == [
        json.loads(one)["path"] for one in lines[1].splitlines()
    ]


def test_the_number_of_threads_changes_no_row(model, folder, tmp_path) -> None:
    for threads in ("1", "2"):
        in_openvino(model, folder, tmp_path / f"{threads}.npy", "--threads", threads)
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


def test_a_run_that_failed_goes_on_where_it_was(model, folder, tmp_path, monkeypatch) -> None:
    in_openvino(model, folder, tmp_path / "whole.npy")
    run = LocalExecutor.rows

    def some(self, *arguments):
        for number, batch in enumerate(run(self, *arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(LocalExecutor, "rows", some)
    output = tmp_path / "halves.npy"
    assert embed(model, folder, output, "--providers", "openvino").exit_code == 130
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused = embed(model, folder, output, "--providers", "cpu", "--resume")
    assert refused.exit_code == 1
    assert "runner" in refused.output
    assert in_openvino(model, folder, output, "--resume")["resumed_at"] == 20
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@needs_bf16
def test_bf16_is_a_runner_of_its_own(model, folder, tmp_path) -> None:
    told = in_openvino(model, folder, tmp_path / "bf16.npy", "--precision", "bf16")
    assert told["runner"] == f"OpenVINO {VERSION}, CPU, bf16"
    in_openvino(model, folder, tmp_path / "fp32.npy")
    found, wanted = rows(tmp_path / "bf16.npy"), rows(tmp_path / "fp32.npy")
    good = ~np.isnan(wanted).any(axis=1)
    error = np.linalg.norm(found[good] - wanted[good]) / np.linalg.norm(wanted[good])
    assert 1e-4 < error < 5e-2  # bf16's gate


def test_a_precision_of_onnxruntime_is_refused(model, folder, tmp_path) -> None:
    result = embed(model, folder, tmp_path / "o.npy", "--providers", "cpu", "--precision", "bf16")
    assert result.exit_code == 1
    assert "precision is for OpenVINO: add the provider openvino, or leave pre" in result.output


def test_the_table_says_what_was_computed_in(model, folder, tmp_path) -> None:
    result = embed(model, folder, tmp_path / "o.npy", "--providers", "openvino")
    assert "10 of 10 products in fp32, 2 attention in fp32" in " ".join(result.output.split())


def test_it_runs_where_neither_onnxruntime_nor_onnx_is_installed(model, folder, tmp_path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['onnxruntime', 'onnx', 'torch'])); "
        "from msn_export.cli import main; main()"
    )
    given = [str(model), str(folder), "-o", str(tmp_path / "o.npy"), "--providers", "openvino"]
    command = [sys.executable, "-c", code, "embed", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "OpenVINO" in done.stdout
