"""``msn-export embed`` that ended in the middle goes on, to the same bytes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msn_export.embedding.inference import LocalExecutor
from tests.builders.embeds import BROKEN, COUNT, embed
from tests.builders.tiny_artifacts import classifier, pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("embed"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, BROKEN)


SCRIPT = """
import sys
from msn_export.embedding import outputs
outputs.SECONDS = 0.0  # each batch a part: a tiny run would be over before its first
from msn_export.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def start(script: Path, *arguments: object) -> subprocess.Popen[str]:
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def children(process: int) -> set[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child) for child in found}


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.002)


def running(process: int) -> bool:
    """Say whether a process runs; one that ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("kind", "number"), [("npy", signal.SIGKILL), ("parquet", signal.SIGINT)])
def test_ended_in_the_middle_and_resumed_it_writes_the_same_bytes(
    model, folder, tmp_path, kind, number
) -> None:
    whole, output = tmp_path / f"whole.{kind}", tmp_path / f"halves.{kind}"
    assert embed(model, folder, whole, "--batch", "2").exit_code == 0
    parts = tmp_path / f"halves.{kind}.parts"
    script = tmp_path / "slow_parts.py"
    arguments = ("embed", model, folder, "-o", output, "--batch", "2")
    with start(script, *arguments) as run:
        journal = parts / "parts.jsonl"
        wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 4)
        workers = children(run.pid)
        run.send_signal(number)
        stderr = run.communicate(timeout=60)[1]
    assert workers
    wait_for(lambda: not any(running(worker) for worker in workers))
    assert not output.exists()
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert f"of {COUNT} rows are kept in {parts}" in stderr
        assert "the same command with --resume goes on from there" in stderr
        assert "Traceback" not in stderr
    else:
        assert run.returncode == -signal.SIGKILL
    refused = embed(model, folder, output, "--batch", "2")
    assert refused.exit_code == 1
    assert "--resume goes on from there, --force starts over" in refused.stderr
    resumed = embed(model, folder, output, "--batch", "2", "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert 0 < json.loads(resumed.stdout)["resumed_at"] < COUNT
    assert output.read_bytes() == whole.read_bytes()
    for ending in (".rows.jsonl", ".json") if kind == "npy" else ():
        sidecars = [path.with_name(path.name + ending).read_bytes() for path in (whole, output)]
        assert sidecars[0] == sidecars[1]
    assert not parts.exists()


def test_a_full_disk_is_one_line_and_what_was_done_is_resumed(model, folder, tmp_path) -> None:
    output, script = tmp_path / "out.npy", tmp_path / "s.py"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    command = [sys.executable, str(script), "embed", str(model), str(folder), "-o", str(output)]
    script.write_text(limited + SCRIPT)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"error: no room left in {tmp_path} (File too large)" in run.stderr
    assert "Traceback" not in run.stderr
    assert not output.exists()
    result = embed(model, folder, output, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed_at"] > 0
    assert embed(model, folder, tmp_path / "whole.npy").exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_resume_refuses_parts_of_another_run(model, folder, tmp_path) -> None:
    output = tmp_path / "out.npy"
    with start(tmp_path / "s.py", "embed", model, folder, "-o", output, "--batch", "2") as run:
        journal = tmp_path / "out.npy.parts" / "parts.jsonl"
        wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 2)
        run.kill()
        run.communicate(timeout=60)
    more = pictures(tmp_path / "more", 3)
    for options, told in (
        (("--batch", "3"), "begun with another batch (2, now 3)"),
        (("--batch", "2", "--preprocess", "msn-eval"), "begun with another preprocessing"),
        (("--batch", "2", "--output-name", "logits"), "begun with another output name"),
    ):
        result = embed(model, folder, output, "--resume", *options)
        assert result.exit_code == 1
        assert told in result.stderr
    result = embed(model, more, output, "--resume", "--batch", "2")
    assert "begun with another listing (45 pictures" in result.stderr


def test_resume_with_nothing_to_resume_starts(model, folder, tmp_path) -> None:
    result = embed(model, folder, tmp_path / "out.npy", "--resume", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["resumed_at"] == 0


def test_rows_that_did_not_come_back_are_no_output(model, folder, tmp_path, monkeypatch) -> None:
    made = LocalExecutor.rows

    def without_the_second(self, *arguments):
        for start, rows in made(self, *arguments):
            if start != 4:
                yield start, rows

    with monkeypatch.context() as losing:
        losing.setattr(LocalExecutor, "rows", without_the_second)
        result = embed(model, folder, tmp_path / "out.npy")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: 4 of {COUNT} rows did not come back; the same command with --resume makes them"
    )
    assert not (tmp_path / "out.npy").exists()
    result = embed(model, folder, tmp_path / "out.npy", "--resume", "--json")
    assert json.loads(result.stdout)["resumed_at"] == COUNT - 4
