"""What a server refuses or serves wrongly is named, and a right repository is not accused."""

import json
import os
import re
import shutil
import time

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_export.cli import main
from msn_export.commands.triton import run_lint
from msn_export.errors import SpecError
from msn_export.triton_server import config as messages
from msn_export.triton_server.lint import lint
from tests.builders.engine_builds import built
from tests.builders.engine_graphs import Vit
from tests.builders.triton_artifacts import graph, plan
from tests.builders.triton_runs import wrong
from tests.contracts.triton_faults import FAULTS, write_base

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

BASES = sorted({fault.base for fault in FAULTS})


@pytest.mark.parametrize("base", BASES)
def test_what_the_command_writes_is_right(base, tmp_path) -> None:
    write_base(base, "model", tmp_path / "repo", tmp_path / "work")
    assert wrong(tmp_path / "repo") == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_named(fault, tmp_path) -> None:
    fault.edit(write_base(fault.base, "model", tmp_path / "repo", tmp_path / "work"))
    found = wrong(tmp_path / "repo")
    assert any(fault.says in line for line in found), found


def test_a_single_model_and_an_empty_folder_are_no_repository(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    with pytest.raises(SpecError, match="is one model's folder; give the repository around it"):
        run_lint(folder, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="holds no model's folder"):
        run_lint(tmp_path / "empty", None)
    with pytest.raises(SpecError, match="is no folder"):
        run_lint(tmp_path / "nowhere", None)


def test_a_plan_of_tensorrt_rtx_is_refused_with_what_to_do(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = write_base("plan", "model", tmp_path / "repo", tmp_path / "work")
    (folder / "1/model.plan.json").unlink()
    shutil.copy(built(Vit()).output, folder / "1/model.plan")
    (line,) = wrong(tmp_path / "repo")
    assert "a TensorRT-RTX 1." in line
    assert "serve the .onnx, or compile with --backend tensorrt" in line


def test_an_engine_without_a_manifest_is_noted_as_unchecked(tmp_path) -> None:
    folder = write_base("plan", "model", tmp_path / "repo", tmp_path / "work")
    (folder / "1/model.plan.json").unlink()
    notes = [finding.what for finding in run_lint(tmp_path / "repo", None)]
    assert "no manifest beside it: its tensors and profiles were not checked" in notes


def test_the_release_given_by_hand_wins_over_the_one_stated(tmp_path) -> None:
    write_base("plan", "model", tmp_path / "repo", tmp_path / "work")
    assert run_lint(tmp_path / "repo", "25.09") == ()
    (finding,) = run_lint(tmp_path / "repo", "25.08")
    assert "built by TensorRT 10.13.3.9, and Triton 25.08 has 10.13.2.6" in finding.what
    (finding,) = run_lint(tmp_path / "repo", "26.07")
    assert finding.level == "note"
    assert "which TensorRT is in Triton 26.07 is not known" in finding.what


def test_a_huge_file_is_not_read(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    for place in ("config.pbtxt", "1/model.onnx"):
        os.truncate(folder / place, 2**40)  # sparse: it takes no room
    started = time.monotonic()
    found = wrong(tmp_path / "repo")
    assert any("config.pbtxt is larger than a configuration can be" in line for line in found)
    assert any("model.onnx" in line for line in found)
    assert time.monotonic() - started < 5


def test_the_command_exits_with_1_and_prints_what_is_wrong(tmp_path) -> None:
    folder = write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    right = CliRunner().invoke(main, ["triton", "--lint", str(tmp_path / "repo")])
    assert right.exit_code == 0
    assert "nothing wrong" in right.stdout
    (folder / "labels.txt").write_text("cat\n")
    asked = ["triton", "--lint", str(tmp_path / "repo"), "--json"]
    result = CliRunner().invoke(main, asked)
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["passed"] is False
    assert {finding["level"] for finding in told["findings"]} == {"wrong"}
    assert CliRunner().invoke(main, asked[:-1]).exit_code == 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_is_refused_in_one_line(text) -> None:
    try:
        messages.from_text(text)
    except SpecError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """One repository a base, with the text of the configuration that is mutated."""
    made = {}
    for base in BASES:
        folder = tmp_path_factory.mktemp(base)
        changed = write_base(base, "model", folder / "repo", folder / "work")
        made[base] = (changed / "config.pbtxt", (changed / "config.pbtxt").read_text())
    return made


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(BASES), st.randoms(use_true_random=False))
def test_no_mutated_configuration_crashes_the_check(repositories, base, random) -> None:
    path, text = repositories[base]
    lines = text.splitlines()
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(lines))
        kind = random.choice(["drop", "twice", "number", "word", "swap"])
        if kind == "drop":
            del lines[place]
        elif kind == "twice":
            lines.insert(place, lines[place])
        elif kind == "number":
            number = random.choice(["-1", "0", "2147483647", "9223372036854775807", "-7"])
            lines[place] = re.sub(r"-?\d+", number, lines[place])
        elif kind == "word":
            word = random.choice(['""', '"../x"', '"/etc/passwd"', '"model.onnx"', '"é"', '"9"'])
            lines[place] = re.sub(r'"[^"]*"', word, lines[place])
        else:
            other = random.randrange(len(lines))
            lines[place], lines[other] = lines[other], lines[place]
    path.write_text("\n".join(lines))
    for finding in run_lint(path.parent.parent, None):
        assert finding.what
        assert "\n" not in finding.what


def test_a_deeply_nested_configuration_is_refused() -> None:
    with pytest.raises(SpecError):
        messages.from_text("optimization { cuda { " + "x { " * 5000)


def test_each_artifact_is_read_once_for_all_its_configurations(tmp_path) -> None:
    write_base("graph", "model", tmp_path / "repo", tmp_path / "work")
    from msn_export.triton_server.model import read_artifact

    seen = []

    def read(path, platform):
        seen.append(path)
        return read_artifact(path, platform)

    assert lint(tmp_path / "repo", read) == ()
    assert len(seen) == 1


def test_a_foreign_repository_of_an_onnx_file_alone_is_checked(tmp_path) -> None:
    folder = tmp_path / "repo/model"
    (folder / "1").mkdir(parents=True)
    graph(folder / "1/model.onnx", manifest=False)
    (folder / "config.pbtxt").write_text(
        'backend: "onnxruntime"\nmax_batch_size: 8\n'
        'input { name: "pixel_values" data_type: TYPE_FP32 dims: [3, 8, 8] }\n'
        'output { name: "logits" data_type: TYPE_FP32 dims: [4] }\n'
        'output { name: "embedding" data_type: TYPE_FP32 dims: [3] }\n'
        "dynamic_batching { }\n"
    )
    (line,) = wrong(tmp_path / "repo")
    assert "output 'logits' dims: [4]; the artifact's are [3]" in line


def test_a_model_of_another_backend_is_left_alone(tmp_path) -> None:
    folder = tmp_path / "repo/other"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text('backend: "python"\n')
    (finding,) = run_lint(tmp_path / "repo", None)
    assert finding.level == "note"
    plan(tmp_path / "x.engine")
