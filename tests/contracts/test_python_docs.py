"""The examples of docs/python.md run as they stand, one after the other; its table is complete."""

import re
import shutil
from pathlib import Path

import pytest

import msn_export
from msn_export.cli import main

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "python.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="there are no docs here")


def test_the_examples_run_one_after_the_other(photographs, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    shutil.copytree(photographs, tmp_path / "photographs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5

    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102  our own document
    told = capsys.readouterr().out
    assert "2 of 2 blocks fused" in told
    assert re.search(r"least cosine (1\.0000|0\.9999)\d\d on 16 images", told)
    assert re.search(r"model\.engine \{'Half': \d+\} False", told)
    assert "output model.onnx exists; force=True replaces it, output writes elsewhere" in told
    assert "load checkpoint ..." in told
    assert re.search(r"^LABEL_\d 0\.\d\d, LABEL_\d 0\.\d\d$", told, re.MULTILINE)


def test_every_command_is_in_the_table_with_its_function() -> None:
    rows = re.findall(r"^\| `?(\w*)`? *\| `(\w+)\(", DOCUMENT.read_text(), re.MULTILINE)
    assert {command for command, _ in rows if command} == set(main.commands)
    functions = {name for name in msn_export.__all__ if name[0].islower()}
    assert {function for _, function in rows} == functions
