"""Output files appear whole or not at all, and nothing of the user's is lost."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from msn_export import files
from msn_export.errors import OutputError
from msn_export.files import publish, require_writable, staging, written
from msn_export.manifest import manifest_path


def message_of(*outputs: Path, force: bool = False, sources: tuple[Path, ...] = ()) -> str:
    with pytest.raises(OutputError) as raised:
        require_writable(outputs, force=force, sources=sources)
    return str(raised.value)


# --- before the work ------------------------------------------------------------------------------


def test_a_new_file_in_a_folder_that_is_there_is_fine(tmp_path) -> None:
    require_writable([tmp_path / "m.onnx", tmp_path / "m.onnx.json"], force=False)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept_unless_forced(tmp_path) -> None:
    new, old = tmp_path / "m.onnx", tmp_path / "m.onnx.json"
    old.write_text("mine")
    assert message_of(new, old) == (
        f"output {old} exists; --force replaces it, -o writes elsewhere"
    )
    require_writable([new, old], force=True)
    assert old.read_text() == "mine"


def test_a_link_to_nothing_is_something_of_the_users(tmp_path) -> None:
    (tmp_path / "m.onnx").symlink_to(tmp_path / "none")
    assert "exists; --force replaces it" in message_of(tmp_path / "m.onnx")
    require_writable([tmp_path / "m.onnx"], force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path, force) -> None:
    assert message_of(tmp_path, force=force) == (
        f"output {tmp_path} is a folder; name a file with -o"
    )
    assert message_of(Path("/dev/null"), force=force) == (
        "output /dev/null is a device or a pipe; name a file with -o"
    )
    assert message_of(tmp_path / "none" / "m.onnx", force=force) == (
        f"output folder {tmp_path / 'none'} does not exist; create it or choose another -o"
    )


def test_what_is_read_is_never_replaced(tmp_path) -> None:
    source, link = tmp_path / "m.onnx", tmp_path / "link.onnx"
    source.write_text("graph")
    link.symlink_to(source)
    for output in (source, link, tmp_path / "." / "m.onnx"):
        assert message_of(output, force=True, sources=(source,)) == (
            f"output {output} is what is read; choose another with -o"
        )
    # a checkpoint may be no path at all
    require_writable([source], force=True, sources=(Path("a" * 5000), Path("a\0b")))


@pytest.mark.parametrize("there", [False, True])
def test_two_outputs_that_are_one_file_are_refused(tmp_path, there) -> None:
    output = tmp_path / "m.engine"
    if there:
        output.touch()
    other = tmp_path / "." / ".." / tmp_path.name / "m.engine"
    assert message_of(output, other, force=True) == (
        f"output {other} would be written twice; name two files"
    )


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch) -> None:
    # root may write everywhere: what the system answers anyone else is put in its place
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert message_of(tmp_path / "m.onnx") == (
        f"output folder {tmp_path} is not writable; choose another with -o"
    )


# --- during it ------------------------------------------------------------------------------------


def test_what_is_left_in_the_staging_folder_is_deleted(tmp_path) -> None:
    with staging(tmp_path) as stage:
        assert stage.parent == tmp_path
        assert stage.stat().st_mode & 0o777 == 0o700
        (stage / "deep").mkdir()
        (stage / "deep" / "m.onnx").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_so_it_is_when_the_work_fails(tmp_path) -> None:
    def work() -> None:
        with staging(tmp_path) as stage:
            (stage / "m.onnx").write_text("half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["mkdir", "open", "flock"])
def test_so_it_is_when_an_interrupt_comes_while_the_folder_is_made(
    tmp_path, monkeypatch, call
) -> None:
    place = {"mkdir": Path, "open": os, "flock": fcntl}[call]
    real, came = getattr(place, call), []

    def interrupted(*given: Any, **options: Any) -> Any:
        done = real(*given, **options)
        if list(tmp_path.iterdir()) and not came:
            came.append(call)
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(place, call, interrupted)
    with pytest.raises(KeyboardInterrupt), staging(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_as_such(tmp_path, code) -> None:
    with pytest.raises(OutputError) as raised, staging(tmp_path):
        raise OSError(code, os.strerror(code))
    assert str(raised.value) == (
        f"no room left in {tmp_path} ({os.strerror(code)}); free some or choose another -o"
    )


def test_another_error_of_the_system_stays_what_it_is(tmp_path) -> None:
    with pytest.raises(PermissionError), staging(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_is_gone_is_told(tmp_path) -> None:
    expected = r"cannot write in .*none: No such file or directory"
    with pytest.raises(OutputError, match=expected), staging(tmp_path / "none"):
        pass


def mounted(folder: Path, *options: str) -> bool:
    run = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    return run.returncode == 0


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_file_system_that_is_read_only_is_named(tmp_path) -> None:
    if not mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        pytest.skip("only root may mount a read-only file system")
    try:
        assert "is not writable; choose another with -o" in message_of(tmp_path / "m.onnx")
        with pytest.raises(OutputError, match="Read-only file system"), staging(tmp_path):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_disk_that_fills_up_is_named_and_nothing_left(tmp_path) -> None:
    if not mounted(tmp_path, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        pytest.skip("only root may mount a small file system")
    try:
        expected = r"no room left in .* \(No space left on device\)"
        with pytest.raises(OutputError, match=expected), staging(tmp_path) as stage:
            (stage / "m.onnx").write_bytes(bytes(100_000))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- after a kill ---------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from msn_export.files import staging
with staging(Path(sys.argv[1])) as stage:
    (stage / "m.onnx").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path) -> None:
    (tmp_path / ".msn-export-notes").mkdir()  # the user's own
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        (alive,) = tmp_path.glob(f"{files.STAGING_PREFIX}*")
        with staging(tmp_path):  # its owner lives: it is left alone
            assert (alive / "m.onnx").exists()
        run.kill()
    assert alive.exists()
    with staging(tmp_path):
        assert not alive.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".msn-export-notes"]


def test_a_link_in_the_place_of_a_staging_folder_is_not_followed(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / f"{files.STAGING_PREFIX}x").symlink_to(tmp_path / "mine")
    with staging(tmp_path):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_two_runs_stage_at_once(tmp_path) -> None:
    with staging(tmp_path) as one, staging(tmp_path) as other:
        assert one != other
        assert one.exists()
        held = os.open(one, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)


# --- the end --------------------------------------------------------------------------------------


def test_an_artifact_and_its_manifest_appear_together(tmp_path) -> None:
    output = tmp_path / "m.onnx"
    with staging(tmp_path) as stage:
        (stage / "m.onnx").write_text("graph")
        publish(stage / "m.onnx", output, "{}", force=False)
    assert output.read_text() == "graph"
    assert manifest_path(output).read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    assert output.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_the_old_manifest_stays_until_the_new_artifact_is_there(tmp_path, monkeypatch) -> None:
    output = tmp_path / "m.onnx"
    output.write_text("old")
    manifest_path(output).write_text("of the old")
    moves: list[tuple[str, str]] = []
    move = Path.replace

    def watched(self: Path, target: Path) -> Path:
        moves.append((target.name, manifest_path(output).read_text()))
        return move(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with staging(tmp_path) as stage:
        (stage / "m.onnx").write_text("new")
        publish(stage / "m.onnx", output, "of the new", force=True)
    assert moves == [("m.onnx", "of the old"), ("m.onnx.json", "of the old")]
    assert (output.read_text(), manifest_path(output).read_text()) == ("new", "of the new")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_a_set_is_whole(tmp_path, monkeypatch, number) -> None:
    output, move = tmp_path / "m.onnx", Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        signal.raise_signal(number)
        return move(self, target)

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with staging(tmp_path) as stage:
            (stage / "m.onnx").write_text("new")
            monkeypatch.setattr(Path, "replace", interrupted)
            publish(stage / "m.onnx", output, "of the new", force=True)

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    assert written()[-2:] == (str(output), str(manifest_path(output)))


def test_a_refused_move_is_told(tmp_path) -> None:
    output = tmp_path / "m.onnx"
    output.mkdir()
    (output / "full").touch()
    with staging(tmp_path) as stage:
        (stage / "m.onnx").write_text("graph")
        with pytest.raises(OutputError, match=r"cannot write .*m\.onnx: Is a directory"):
            publish(stage / "m.onnx", output, "{}", force=True)


@pytest.mark.parametrize("taken", ["m.onnx", "m.onnx.json", "m.ranges.json"])
def test_what_another_run_has_written_meanwhile_is_not_replaced(tmp_path, taken) -> None:
    output = tmp_path / "m.onnx"
    require_writable([output, manifest_path(output)], force=False)  # as every run begins
    with staging(tmp_path) as stage:
        (stage / "m.onnx").write_text("graph")
        (stage / "m.ranges.json").write_text("ranges")
        (tmp_path / taken).write_text("of the other run")
        with pytest.raises(OutputError, match=rf"{taken} was written by another run meanwhile"):
            publish(stage / "m.onnx", output, "{}", beside=[stage / "m.ranges.json"], force=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        taken: "of the other run"
    }


def test_two_runs_never_mix_an_artifact_with_the_others_manifest(tmp_path, monkeypatch) -> None:
    output, move = tmp_path / "m.onnx", Path.replace

    def slow(self: Path, target: Path) -> Path:
        found = move(self, target)
        time.sleep(0.05)  # between the artifact and its manifest
        return found

    def run(name: str) -> None:
        with staging(tmp_path) as stage:
            (stage / "m.onnx").write_text(name)
            publish(stage / "m.onnx", output, name, force=True)

    monkeypatch.setattr(Path, "replace", slow)
    runs = [threading.Thread(target=run, args=(name,)) for name in ("one", "other", "third")]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert output.read_text() == manifest_path(output).read_text()


# --- the user's cache -----------------------------------------------------------------------------


def test_a_file_of_the_cache_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "timing"
    files.write_whole(path, b"first")
    files.write_whole(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"

    def full(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, b"third")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("timing", b"second")
    ]


def test_a_process_that_keeps_the_lock_is_waited_for_but_not_for_ever(
    tmp_path, monkeypatch
) -> None:
    with files.locked(tmp_path):
        monkeypatch.setattr(files, "_PATIENCE", 0.05)
        with pytest.raises(TimeoutError, match="another process keeps the folder locked"):
            files.locked(tmp_path).__enter__()
        monkeypatch.setattr(files, "_PATIENCE", 60.0)
        entered = threading.Event()

        def enter() -> None:
            with files.locked(tmp_path):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.1)
    assert entered.wait(60)
    waiting.join()
