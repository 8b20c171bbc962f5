"""Names of folders, tensors and labels in what is generated: shell, Python, pbtxt and pages.

The documents are executed: a name that is not quoted for where it stands runs, or is another word.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from msn_export import manifest
from msn_export.cli import main
from msn_export.errors import ESCAPES
from msn_export.triton_server.config import from_text
from tests.builders.checkpoints import hugging_face
from tests.builders.triton_artifacts import graph

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

HOSTILE = {
    "spaces": "two words",
    "double quotes": 'a"b"; touch ran; "',
    "single quotes": "it's; touch ran",
    "backticks": "`touch ran`",
    "substitution": "$(touch ran)",
    "variable": "$HOME",
    "option": "-o",
    "colon": "a:b",
    "fence": "```",
    "backslash": "a\\",
    "letters": "dög 猫",
}
# each writes its words to a file of its own name
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$RECORDS/$(basename "$0")"
"""


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def executed(script: str, folder: Path) -> dict[str, list[str]]:
    """Run a script where docker, curl and msn-export note their words; give those by program."""
    programs, records = folder / "bin", folder / "records"
    for made in (programs, records):
        made.mkdir(exist_ok=True)
    for name in ("docker", "curl", "msn-export"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RECORDS": str(records),
    }
    subprocess.run(
        ["sh", "-eu"], input=script, text=True, cwd=folder, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    return {path.name: path.read_text().splitlines() for path in records.iterdir()}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_the_folder_of_a_repository_is_one_word_in_what_its_readme_runs(tmp_path, name) -> None:
    graph(tmp_path / "m.onnx")
    result = invoke("triton", tmp_path / "m.onnx", "-o", tmp_path / name)
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / name / "m" / "README.md").read_text(encoding="utf-8")
    shell = [part.split("\n```")[0] for part in text.split("```sh\n")[1:]]
    words = executed("\n".join(shell), tmp_path)
    assert not (tmp_path / "ran").exists()
    place = f"{tmp_path}/{name}"
    if ":" in name:
        assert f"type=bind,source={place},target=/models,readonly" in words["docker"]
    else:
        assert f"{place}:/models:ro" in words["docker"]
    folder = f"./{name}" if name.startswith("-") else name
    assert words["msn-export"] == [
        "triton", "NEW.onnx", "-o", folder, "--name", "m", "--model-version", "2",
        "triton", "--lint", folder,
    ]  # fmt: skip
    code = text.split("```python\n")[1].split("\n```")[0]
    opened = code[: code.index("batch = ")]
    run = subprocess.run(
        [sys.executable, "-c", f"{opened}\nprint(known.output)"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, "m.onnx\n"), run.stderr


def test_a_folder_that_cannot_be_printed_is_refused(tmp_path) -> None:
    graph(tmp_path / "m.onnx")
    for name in ("a\nb", "\u202ea", "a\x1b[2J"):
        result = invoke("triton", tmp_path / "m.onnx", "-o", tmp_path / name)
        assert result.exit_code == 1
        assert "is not printable; choose another repository with -o" in result.stderr


@pytest.mark.parametrize("name", ['a"b', "a\\", "`touch ran`", "$(touch ran)", "a b", "it's"])
def test_a_tensors_name_stays_a_string_in_pbtxt_and_python(tmp_path, name) -> None:
    graph(tmp_path / "m.onnx", manifest=False)
    model = onnx.load(tmp_path / "m.onnx")
    before = model.graph.input[0].name
    model.graph.input[0].name = name
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == before:
                node.input[index] = name
    onnx.save(model, tmp_path / "m.onnx")
    result = invoke("triton", tmp_path / "m.onnx", "-o", tmp_path / "repo")
    assert result.exit_code == 0, result.stderr
    config = from_text((tmp_path / "repo/m/config.pbtxt").read_text())
    assert config.input[0].name == name
    code = (tmp_path / "repo/m/README.md").read_text().split("```python\n")[1].split("\n```")[0]
    assert f"triton.InferInput({json.dumps(name)}, " in code
    compile(code, "client.py", "exec")


LABELS = ["a\u202eb", "c\x1b[2Jd", "`touch ran` $(touch ran) | x", "<b>\u2066"]


def test_no_page_and_no_file_of_labels_has_characters_that_are_obeyed(tmp_path) -> None:
    (tmp_path / "tiny").mkdir()
    hugging_face(tmp_path / "tiny", labels=4)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    model, page = tmp_path / "m.onnx", tmp_path / "r.html"
    made = invoke("onnx", tmp_path / "tiny", "-o", model, "--labels", tmp_path / "labels.json")
    assert made.exit_code == 0, made.stderr
    read = manifest.read(model)
    assert read is not None
    assert list(read.labels) == LABELS
    result = invoke("report", model, "-o", page, "--markdown", tmp_path / "r.md")
    assert result.exit_code == 0, result.stderr
    assert invoke("triton", model, "-o", tmp_path / "repo").exit_code == 0
    labels = tmp_path / "repo/m/labels.txt"
    assert len(labels.read_text(encoding="utf-8").splitlines()) == 4
    assert invoke("triton", "--lint", tmp_path / "repo").exit_code == 0
    for path in (page, tmp_path / "r.md", labels, tmp_path / "repo/m/README.md"):
        assert not set(map(ord, path.read_text(encoding="utf-8"))) & set(ESCAPES), path
    assert "\\u202e" in labels.read_text(encoding="utf-8")
