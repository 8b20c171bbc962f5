"""What commands print with --json is what docs/schemas says."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import json_schemas
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from msn_export.cli import main
from tests.builders import artifacts
from tests.builders.tiny_artifacts import pictures, predicted

SCHEMAS = {path.stem: path for path in json_schemas.FOLDER.glob("*.json")}


@cache
def made() -> dict[str, dict[str, Any]]:
    return json_schemas.schemas()


def test_the_files_are_those_that_the_script_makes_of_the_code() -> None:
    assert set(SCHEMAS) == set(made())
    for command, path in SCHEMAS.items():
        assert json.loads(path.read_text(encoding="utf-8")) == made()[command], (
            f"{path.name} is of other code; run python scripts/json_schemas.py"
        )


def test_every_command_with_json_has_one() -> None:
    takes = {
        name
        for name, command in main.commands.items()
        if any("--json" in param.opts for param in command.params)
    }
    assert set(SCHEMAS) == takes


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_each_is_a_schema(command) -> None:
    Draft202012Validator.check_schema(made()[command])


def validated(command: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> Any:
    result = CliRunner().invoke(main, [command, *map(str, arguments), "--json"])
    assert result.exit_code in codes, result.output
    told = json.loads(result.stdout)
    Draft202012Validator(made()[command]).validate(told)
    return told


def test_graph_and_engine(tmp_path) -> None:
    graph, engine = artifacts.classifier(), artifacts.engine()
    images = pictures(tmp_path / "images", 4)
    for command, artifact in (("onnx", graph), ("trt", engine)):
        manifest = json.loads(Path(f"{artifact}.json").read_text(encoding="utf-8"))
        del manifest["seal"]  # of the file; what is printed has none
        Draft202012Validator(made()[command]).validate(manifest)
    validated("inspect", engine)
    validated("inspect", graph, engine)
    validated("validate", graph, graph, "--images", images)
    validated("drift", graph, graph, "--images", images, "--limit", 4)
    validated("embed", graph, images, "-o", tmp_path / "out.npy")
    validated("bench", graph, "--against", "none", "--rounds", 2, "--seconds", 0.1, "--batch", 1)


def test_what_is_wrong_is_described_too(tmp_path) -> None:
    graph = artifacts.copy_of(artifacts.classifier(), tmp_path)
    graph.with_name("m.onnx.json").write_text("{")
    assert validated("inspect", graph, codes=(1,))["distrusted"]


def test_quantised_and_evaluated(tmp_path) -> None:
    graph = artifacts.classifier()
    images = pictures(tmp_path / "images", 12)
    validated(
        "calibrate", graph, "--int8", "--images", images, "-o", tmp_path / "q.onnx",
        "--smooth", "off", "--no-compile", "--base", "fp32", "--gate-cosine", "0",
    )  # fmt: skip
    validated("evaluate", graph, predicted(tmp_path / "labelled", graph, 12))


def test_triton_and_doctor(tmp_path) -> None:
    validated("triton", artifacts.classifier(), "-o", tmp_path / "repository")
    result = CliRunner().invoke(main, ["triton", "--lint", str(tmp_path / "repository"), "--json"])
    Draft202012Validator(made()["triton"]).validate(json.loads(result.stdout))
    validated("doctor", codes=(0, 1))
