"""The examples run as their READMEs say, and show what they claim."""

import json
import os
import re
import runpy
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

import numpy as np
import pytest

from msn_export.runtime import open_runner
from tests.builders import artifacts
from tests.builders.pages import read
from tests.builders.tiny_artifacts import classifier

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MAPS = EXAMPLES / "attention_maps"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the example as a script; give what it prints, or why it ended."""
    script = MAPS / "attention_maps.py"
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
    assert run(capsys, graph, photographs, page) == f"{page}: 8 pictures, 2 heads"
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
    assert run(capsys, graph, photographs, tmp_path / "page.html") == (
        f"error: {graph} has no output 'attention'; export it with --head attention"
    )
    assert "error: image folder " in run(capsys, graph, tmp_path / "none", tmp_path / "page.html")
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


# --- all of them ----------------------------------------------------------------------------------


def test_every_example_has_one_program_and_a_readme_that_says_how_it_is_run() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert len(folders) > 1
    for folder in folders:
        (program,) = [path.name for path in folder.iterdir() if path.stem == folder.name]
        readme = (folder / "README.md").read_text()
        assert f"examples/{folder.name}" in readme
        assert program.removesuffix(".py") in readme
