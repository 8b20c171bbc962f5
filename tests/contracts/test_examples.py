"""The examples run as their READMEs say, and show what they claim."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from msn_export.runtime import open_runner
from tests.builders import artifacts
from tests.builders.checkpoints import hugging_face
from tests.builders.pages import read
from tests.builders.tiny_artifacts import classifier

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MAPS = EXAMPLES / "attention_maps"


def run(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """Run an example as a script; give what it prints, or why it ended."""
    script = EXAMPLES / name / f"{name}.py"
    sys.argv[:] = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().out.strip()


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])


@pytest.fixture(scope="module")
def overlay() -> Any:
    return runpy.run_path(str(MAPS / "attention_maps.py"))["overlay"]


def test_maps_of_attention_are_drawn_over_photographs(photographs, tmp_path, capsys) -> None:
    graph = classifier(tmp_path, heads=("features", "attention"))
    page = tmp_path / "page.html"
    assert run(capsys, "attention_maps", graph, photographs, page) == f"{page}: 8 pictures, 2 heads"
    reader, text = read(page), page.read_text("utf-8")
    assert reader.tags.count("img") == 8 * (1 + 1 + 2)
    assert all(target.startswith("data:image/jpeg;base64,") for target in reader.fetched)
    names = sorted(path.name for path in photographs.iterdir())[:8]
    assert re.findall("<h2>(.*?)</h2>", text) == names
    with open_runner(graph) as runner:
        maps = runner(sorted(photographs.iterdir())[:8]).attention
    drawn = [f"{each.max():.1%}" for own in maps for each in (own.mean(axis=0), *own)]
    assert re.findall(r"peak ([\d.]+%)\"", text) == drawn


def test_a_picture_is_as_it_is_at_the_peak_and_dark_where_nothing_is_looked_at(overlay) -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 0.3
    shown = np.asarray(overlay(pixels, weights))
    assert (shown[11:13, 19:21] > 170).all()  # the middle of the patch
    assert (shown[:4, :4] == 40).all()
    assert (shown[24:] == 40).all()


def test_a_model_without_the_head_and_a_folder_that_is_none_are_one_line(
    photographs, tmp_path, capsys
) -> None:
    graph = classifier(tmp_path, heads=("cls",))
    assert run(capsys, "attention_maps", graph, photographs, tmp_path / "page.html") == (
        f"error: {graph} has no output 'attention'; export it with --head attention"
    )
    assert "error: image folder " in run(
        capsys, "attention_maps", graph, tmp_path / "none", tmp_path / "page.html"
    )
    assert not (tmp_path / "page.html").exists()


# --- http_service ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service as its README starts it, on a free port; give its address."""
    readme = (EXAMPLES / "http_service" / "README.md").read_text()
    (line,) = re.findall(r"^\$ MODEL=flowers.onnx (uvicorn .*)", readme, re.MULTILINE)
    folder = tmp_path_factory.mktemp("service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *line.split(), "--port", str(port), "--log-level", "error"]
    environment = {**os.environ, "MODEL": str(artifacts.classifier())}
    log = (folder / "log").open("wb")
    with log, subprocess.Popen(command, cwd=EXAMPLES.parent, env=environment, stderr=log) as server:
        try:
            for _ in range(300):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


def posted(address: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address, body, timeout=60) as reply:  # noqa: S310  ours
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_service_answers_bytes_of_a_picture_with_its_labels(service, photographs) -> None:
    (path, *_) = sorted(photographs.iterdir())
    with open_runner(artifacts.classifier()) as runner:
        (guesses,) = runner.top_k(runner(path).logits)
    status, found = posted(service, path.read_bytes())
    assert status == 200
    assert [one["label"] for one in found] == [guess.label for guess in guesses]
    assert [one["score"] for one in found] == pytest.approx([guess.score for guess in guesses])


def test_the_service_refuses_what_is_no_picture_and_what_is_too_large(service) -> None:
    assert posted(service, b"none") == (
        400,
        {"error": "picture 1 is not a readable picture (cannot identify image file)"},
    )
    status, found = posted(service, bytes(32 * 2**20 + 1))
    assert (status, found) == (413, {"error": "a picture has at most 33554432 bytes"})


# --- similar_pictures -----------------------------------------------------------------------------


def test_similar_pictures_are_found_and_the_index_is_made_once(
    photographs, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("usearch")
    graph = classifier(tmp_path / "m", heads=("cls",))
    shutil.copytree(photographs, tmp_path / "photographs")
    monkeypatch.chdir(tmp_path)
    query = Path("photographs", "coffee.png")
    arguments = ("similar_pictures", graph, "photographs", query, "-k", 3)
    first = run(capsys, *arguments).splitlines()
    assert first[0] == "16 pictures, 0 broken, none skipped"
    assert first[1:3] == [str(query), "  1.000  coffee.png"]
    assert len(first) == 5
    assert run(capsys, *arguments).splitlines() == first[1:]


def test_a_query_that_is_no_picture_is_one_line(photographs, tmp_path, capsys) -> None:
    graph = classifier(tmp_path / "m", heads=("cls",))
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    wrong = tmp_path / "a.txt"
    wrong.write_text("none")
    assert run(capsys, "similar_pictures", graph, folder, wrong) == (
        f"error: {wrong} is not a readable picture (cannot identify image file)"
    )


# --- triton_service -------------------------------------------------------------------------------


def test_one_command_writes_a_repository_and_starts_triton_on_it(tmp_path) -> None:
    pytest.importorskip("tritonclient.grpc")
    commands = tmp_path / "bin"
    commands.mkdir()
    docker = commands / "docker"
    docker.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/started\n')
    docker.chmod(0o755)
    own = commands / "msn-export"
    own.write_text(f'#!/bin/sh\nexec {sys.executable} -m msn_export "$@"\n')
    own.chmod(0o755)
    hugging_face(tmp_path / "checkpoint", labels=3)
    script = EXAMPLES / "triton_service" / "triton_service.sh"
    command = ["sh", str(script), str(tmp_path / "checkpoint"), "models"]
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    for _ in range(2):  # again with the repository that is there
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / "models/model/1/model.onnx").is_file()
        started = (tmp_path / "started").read_text().split()
        assert f"{tmp_path.resolve()}/models:/models:ro" in started
        (tmp_path / "started").unlink()
    readme = (tmp_path / "models/model/README.md").read_text()
    (image,) = set(re.findall(r"nvcr\.io/nvidia/tritonserver:\S+", readme))
    assert image in started  # the release that the repository is for
    (tmp_path / "models/model/labels.txt").write_text("one\n")
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert not (tmp_path / "started").exists()  # nothing is served that is wrong


# --- checkpoint_to_engine -------------------------------------------------------------------------


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    photographs, tmp_path, monkeypatch, capsys
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    notebook = json.loads(
        (EXAMPLES / "checkpoint_to_engine" / "checkpoint_to_engine.ipynb").read_text()
    )
    cells = ["".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == "code"]
    assert len(cells) >= 5
    hugging_face(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "checkpoint"))
    monkeypatch.setenv("PICTURES", str(photographs))
    shown: list[int] = []
    names: dict[str, Any] = {}
    with mpl.rc_context({"backend": "agg"}):
        from matplotlib import pyplot

        pyplot.close("all")  # of tests before this one
        monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.get_fignums())))
        for cell in cells:
            exec(compile(cell, "checkpoint_to_engine.ipynb", "exec"), names)  # noqa: S102  ours
        pyplot.close("all")
    assert shown == [1, 2, 3]
    told = capsys.readouterr().out
    assert told.count("'check': 'passed'") == 2
    assert "No stage parts" in told
    assert re.search(r"\d+ kernels, 2 fused attention\nproducts: \{'Half': \d+\}", told)
    assert (tmp_path / "full.engine").is_file()


def test_the_notebook_is_kept_without_what_a_run_leaves_in_it() -> None:
    for path in EXAMPLES.glob("*/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert [one.get("outputs", []) for one in cells] == [[]] * len(cells)


# --- all of them ----------------------------------------------------------------------------------


def test_every_example_has_one_program_and_a_readme_that_says_how_it_is_run() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert len(folders) > 1
    for folder in folders:
        (program,) = [path.name for path in folder.iterdir() if path.stem == folder.name]
        readme = (folder / "README.md").read_text()
        assert f"examples/{folder.name}" in readme
        assert program.removesuffix(".py") in readme
