"""Drills of ``msn-export embed --ray`` on a real Ray: machines and workers go, the rows come.

Ray runs in an environment of its own (scripts/ray_cluster.py), in a network namespace without any
network. Each output is compared, byte for byte, with what the command writes without ``--ray``.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyarrow import parquet

from msn_export.cli import main
from tests.builders.ray_drills import DRILLS, drill, invoke, require_ray
from tests.builders.tiny_artifacts import classifier, pictures

pytestmark = pytest.mark.slow

COUNT, BATCH, BROKEN = 400, 4, 37
BATCHES = COUNT // BATCH


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    require_ray()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("model"), "--batch", f"1:{BATCH}:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, (BROKEN,))


@pytest.fixture(scope="module")
def wanted(model, folder, tmp_path_factory) -> bytes:
    """The table that one machine writes."""
    output = tmp_path_factory.mktemp("wanted") / "out.parquet"
    invoke("embed", model, folder, "-o", output)
    return output.read_bytes()


def batches(notes: Path) -> list[int]:
    """The first rows of the batches that were run, again where one was run again."""
    return [int(line.split()[0]) for line in notes.read_text().splitlines()]


def require_rows(output: Path) -> None:
    table = parquet.read_table(output).to_pylist()
    assert len(table) == COUNT
    assert len({row["path"] for row in table}) == COUNT
    broken = [row for row in table if row["error"] is not None]
    assert [row["path"] for row in broken] == [f"b/{BROKEN:03}.png"]
    assert sum(row["embedding"] is not None for row in table) == COUNT - 1


def test_a_folder_gives_the_same_table_as_on_one_machine(model, folder, wanted, tmp_path) -> None:
    output = tmp_path / "out.parquet"
    run = drill("-m", "msn_export", "embed", model, folder, "-o", output, "--json", "--ray",
                "local")  # fmt: skip
    assert run.returncode == 0, run.stderr
    require_rows(output)
    assert output.read_bytes() == wanted
    told = json.loads(run.stdout)  # and nothing of Ray's on stdout
    assert (told["images"], told["broken"]) == (COUNT, 1)
    assert "1 node" in told["cluster"]
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_killed_worker_costs_no_row(model, folder, wanted, tmp_path) -> None:
    output, notes = tmp_path / "out.parquet", tmp_path / "notes"
    run = drill(DRILLS / "noted.py", notes, "kill", BATCHES // 2, "embed", model, folder, "-o",
                output, "--ray", "local")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "killed").exists()
    assert len({line.split()[2] for line in notes.read_text().splitlines()}) >= 2  # a new worker
    require_rows(output)
    assert output.read_bytes() == wanted


def test_a_removed_node_costs_no_row(model, folder, wanted, tmp_path) -> None:
    output, notes = tmp_path / "out.parquet", tmp_path / "notes"
    run = drill(DRILLS / "two_nodes.py", notes, BATCHES, "embed", model, folder, "-o", output)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["in_the_middle"]
    assert told["by_removed"] >= BATCHES // 6
    assert len(set(batches(notes))) == BATCHES
    require_rows(output)
    assert output.read_bytes() == wanted


def test_after_a_failure_hardly_anything_is_computed_again(model, folder, wanted, tmp_path) -> None:
    output, notes = tmp_path / "out.parquet", tmp_path / "notes"
    command = ("embed", model, folder, "-o", output, "--ray", "local", "--json")
    run = drill(DRILLS / "noted.py", notes, "fail", BATCHES // 2, *command)
    assert run.returncode == 1
    # Ray may write of its own shutdown behind it
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: the drill's model failed"]
    assert "Traceback" not in run.stderr
    assert not output.exists()
    refused = CliRunner().invoke(main, ["embed", str(model), str(folder), "-o", str(output)])
    assert "--resume goes on from there, --force starts over" in refused.stderr
    run = drill(DRILLS / "noted.py", notes, "none", 0, *command, "--resume")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["resumed_at"] > COUNT * 0.4
    again = len(batches(notes)) - len(set(batches(notes)))
    assert again * BATCH <= COUNT * 0.05
    require_rows(output)
    assert output.read_bytes() == wanted
