"""The pages, the help and the messages name the versions that the table has."""

from pathlib import Path

import pytest
import version_table as script
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.commands.jobs import OnnxJob
from msn_export.options import opts_of
from msn_export.spec import Dtype, Target
from msn_export.version_table import Client, table

ROOT = Path(__file__).parent.parent.parent


def part(page: str, name: str) -> str:
    """Cut out what a page has between the marks of a name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- measured: {name} -->\n")[1].split("\n<!-- /measured -->")[0]


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="there are no docs here")
def test_the_pages_are_current() -> None:
    again = "python scripts/version_table.py --pages writes them again"
    assert part("docs/clients.md", "versions") == script.least_table(table()), again
    assert part("docs/clients.md", "evidence") == script.evidence_table(table()), again


def test_every_cell_is_in_the_tables() -> None:
    least, why = script.least_table(table()), script.evidence_table(table())
    for target, rows in table().items():
        for dtype, row in rows.items():
            cells = " | ".join(row[client].least or "none" for client in Client)
            assert f"| {target} | {dtype} | {cells} |" in least
            assert all(
                f"{target} {dtype}" in why and script.evidence(row[c]) in why for c in Client
            )


def test_the_help_of_target_names_the_versions() -> None:
    text = opts_of(OnnxJob)["target"].help or ""
    for target in Target:
        row = table()[target][Dtype.FP16]
        assert f"onnxruntime >= {row[Client.ONNXRUNTIME].least}" in text
        assert f"TensorRT >= {row[Client.TENSORRT].least}" in text
    shown = CliRunner().invoke(main, ["onnx", "--help"]).output
    assert "tensorrt-8" in shown
    assert "portable's other name" in " ".join(shown.split())


def test_every_row_is_that_of_what_can_be_exported() -> None:
    assert set(script.rows()) == {(t, dtype) for t, rows in table().items() for dtype in rows}


# --- the script ----------------------------------------------------------------------------------


def judged(fails: dict[str, str], *versions: str):
    tried = []

    def one(version: str) -> str | None:
        tried.append(version)
        return fails.get(version)

    return script.judge(versions, one), tried


def test_the_least_version_is_found_between_the_minors_and_in_them() -> None:
    versions = ("1.0.0", "1.0.1", "1.1.0", "1.1.1", "1.1.2", "1.2.0")
    cell, tried = judged({"1.0.1": "a", "1.1.0": "Error: too old"}, *versions)
    assert (cell.least, cell.before, cell.fails, cell.newest) == (
        "1.1.1", "1.1.0", "too old", "1.2.0",
    )  # fmt: skip
    assert cell.evidence == "run"
    assert "1.0.0" not in tried  # it is before one that fails


def test_what_runs_in_the_oldest_is_least_tried() -> None:
    cell, _ = judged({}, "1.0.0", "1.1.0")
    assert (cell.least, cell.evidence, cell.before, cell.newest) == (
        "1.0.0", "least tried", None, "1.1.0",
    )  # fmt: skip


def test_what_the_newest_does_not_run_has_no_least() -> None:
    cell, tried = judged({"2.0": "no kernel"}, "1.0", "2.0")
    assert (cell.least, cell.fails, cell.newest) == (None, "no kernel", "2.0")
    assert "1.0" not in tried


def test_a_version_that_does_not_install_is_left_out() -> None:
    def one(version: str) -> str | None:
        if version == "1.1.0":
            raise script.UntriedError(version) from ValueError("no wheel")
        return "no" if version == "1.0.0" else None

    cell = script.judge(("1.0.0", "1.1.0", "1.2.0"), one)
    assert (cell.least, cell.before) == ("1.2.0", "1.0.0")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented: [ONNXRuntimeError] : 9 : "
            "NOT_IMPLEMENTED : Could not find an implementation for Conv(22) node with name 'p'",
            "Could not find an implementation for Conv(22) node with name 'p'",
        ),
        (
            "onnxruntime.capi.onnxruntime_pybind11_state.Fail: [ONNXRuntimeError] : 1 : FAIL : "
            "Load model from /a/b.onnx failed:/onnxruntime_src/core/graph/load_utils.h:46 void "
            "onnxruntime::ValidateOpset(const std::unordered_map<std::string, int>&, bool, int) "
            "ONNX Runtime only *guarantees* support for models stamped with official released onnx "
            "opset versions. Opset 23 is under development and support for this is limited. The "
            "operator schemas and or other functionality may change before next ONNX release.",
            "Opset 23 is under development and support for this is limited.",
        ),
        ("Error: a C++ exception without a text", "a C++ exception without a text"),
        ("x" * 150 + " " + "y" * 150, "x" * 150 + " …"),
    ],
)
def test_a_reason_is_without_paths_and_short(error, reason) -> None:
    assert script.reason(error) == reason
