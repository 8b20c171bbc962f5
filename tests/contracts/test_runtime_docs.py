"""The examples of docs/runtime.md run as they stand; those that need a GPU are read."""

import ast
import re
import shutil
from pathlib import Path

import pytest

import msn_export.runtime
from tests.builders.artifacts import classifier, copy_of

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "runtime.md"


def blocks(kind: str) -> list[str]:
    if not DOCUMENT.is_file():
        return []  # the tests run against the wheel, which has no docs
    return re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="there are no docs here")
def test_the_examples_run_one_after_the_other(photographs, tmp_path, monkeypatch, capsys) -> None:
    model = copy_of(classifier(), tmp_path)
    for path in (model, model.with_name("m.onnx.json")):
        path.rename(tmp_path / path.name.replace("m.onnx", "model.onnx"))
    shutil.copytree(photographs, tmp_path / "photographs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 4
    for block in found:
        exec(compile(block, "docs/runtime.md", "exec"), names)  # noqa: S102  our own document
    told = capsys.readouterr().out
    assert re.search(r"class \d 0\.\d\d, class \d 0\.\d\d", told)
    assert re.search(
        r"<Runner of model\.onnx: .* -> logits float \[batch, 3\]; batch 1:8:32; onn", told
    )
    assert re.search(r"\(200, \{'class \d': 0\.\d+, 'class \d'", told)
    assert "(400, {'error': 'picture 1 is not a readable picture (cannot identify" in told
    assert "selftest passed: output 'logits' of 2 seeded images on onnxruntime" in told


@pytest.mark.parametrize("block", blocks("py"))
def test_what_needs_a_gpu_names_what_exists(block) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msn_export"):
            assert {alias.name for alias in node.names} <= set(msn_export.runtime.__all__)
