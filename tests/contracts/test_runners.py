"""No command ends with a runner open: each is closed where it was opened."""

from pathlib import Path
from typing import Any

import pytest

from msn_export.cli import main
from msn_export.graph.torch_reference import TorchRunner
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.tensorrt import TrtRunner
from tests.builders.artifacts import classifier
from tests.builders.tiny_artifacts import pictures

IMAGES = ("--images", "{pictures}")
COMMANDS = {
    "onnx": ("onnx", "{checkpoint}", "-o", "{out}/m.onnx", "--dtype", "fp16", *IMAGES),
    "trt": ("trt", "{graph}", "-o", "{out}/m.engine", "--fp16", "--backend", "tensorrt-rtx",
            "--compute-capability", "8.9", *IMAGES),
    "calibrate": ("calibrate", "{graph}", "--int8", "-o", "{out}/q.onnx", "--no-compile", *IMAGES),
    "validate": ("validate", "{checkpoint}", "{graph}", *IMAGES),
    "drift": ("drift", "{checkpoint}", "{graph}", *IMAGES),
    "report": ("report", "{graph}", "{copy}", "-o", "{out}/r.html", *IMAGES),
    "embed": ("embed", "{graph}", "{pictures}", "-o", "{out}/v.npy"),
    "bench": ("bench", "{graph}", "--against", "none", "--rounds", "1", "--seconds", "0.1"),
}  # fmt: skip
CHILDREN = {"bench"}  # its runners are open in processes that it starts and ends


class Opened:
    """Counts the runners of this process: those that were opened, and those that still are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ever = 0
        self.now: dict[int, Any] = {}  # holding them, or another might get the id of one
        for kind in (OrtRunner, TorchRunner, TrtRunner):
            self._watch(monkeypatch, kind, kind.__init__, kind.close)

    def _watch(self, monkeypatch: Any, kind: Any, begin: Any, close: Any) -> None:
        def opened(runner: Any, *given: Any, **options: Any) -> None:
            begin(runner, *given, **options)
            self.ever += 1
            self.now[id(runner)] = runner

        def closed(runner: Any) -> None:
            close(runner)
            self.now.pop(id(runner), None)

        monkeypatch.setattr(kind, "__init__", opened)
        monkeypatch.setattr(kind, "close", closed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runners")
    pictures(folder / "pictures", 12)
    (folder / "copy.onnx").write_bytes(classifier().read_bytes())
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_no_runner_is_open_at_the_end_of_a_command(folder, tmp_path, monkeypatch, command) -> None:
    if command == "trt":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    names = {
        "checkpoint": classifier().parent / "hf", "graph": classifier(), "out": tmp_path,
        "copy": folder / "copy.onnx", "pictures": folder / "pictures",
    }  # fmt: skip
    opened = Opened(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main([part.format(**names) for part in COMMANDS[command]], prog_name="msn-export")
    assert ended.value.code == 0
    assert [runner.name for runner in opened.now.values()] == []
    assert (opened.ever == 0) is (command in CHILDREN)
