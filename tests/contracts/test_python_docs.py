"""The examples of docs/python.md run as they stand, one after the other; its table is complete."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from msn_export.cli import main

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "python.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="there are no docs here")
# commands whose function is no story of a job, or is named otherwise
OTHERWISE = {"doctor", "inspect"}


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
    assert "output model.onnx exists; --force replaces it, -o writes elsewhere" in told
    assert "load checkpoint ..." in told


def test_every_command_is_in_the_table_and_the_table_names_what_exists() -> None:
    text = DOCUMENT.read_text()
    row = r"^\| `msn_export\.commands\.(\w+)` \| `(\w+)` \|"
    rows = dict(re.findall(row, text, re.MULTILINE))
    assert set(rows) == set(main.commands) - OTHERWISE
    for command, job in rows.items():
        found = importlib.import_module(f"msn_export.commands.{command}")
        assert callable(getattr(found, f"run_{command}"))
        assert getattr(found, job).__dataclass_fields__
