"""Output files appear whole or not at all."""

import errno
import fcntl
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msn_export.errors import OutputError, SpecError
from msn_export.manifest import manifest_path

STAGING_PREFIX = ".msn-export-staging-"  # whatever is called so is ours to delete


def require_writable(outputs: Sequence[Path], *, force: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse, before any work is done, outputs that could not be put in place after it.

    ``force`` lets existing files be replaced, but none of ``sources``, which the work reads.
    """
    for path in (*outputs, *sources):
        _require_text(path)
    for index, output in enumerate(outputs):
        folder = output.parent
        if not output.name:
            raise OutputError(f"output {str(output)!r} names no file; name one with -o")
        if output.is_dir():
            raise OutputError(f"output {output} is a folder; name a file with -o")
        if not folder.is_dir():
            raise OutputError(
                f"output folder {folder} does not exist; create it or choose another -o"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"output folder {folder} is not writable; choose another with -o")
        if output.exists() and not output.is_file():
            raise OutputError(f"output {output} is a device or a pipe; name a file with -o")
        if any(same_file(source, output) for source in sources):
            raise OutputError(f"output {output} is what is read; choose another with -o")
        if any(same_file(other, output) for other in outputs[:index]):
            raise OutputError(f"output {output} would be written twice; name two files")
        if os.path.lexists(output) and not force:
            raise OutputError(f"output {output} exists; --force replaces it, -o writes elsewhere")


def _require_text(path: Path) -> None:
    """Refuse a path that is not UTF-8: torch, safetensors, onnx and TensorRT take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"path {str(path)!r} is not UTF-8; rename it") from error


def same_file(one: Path, other: Path) -> bool:
    """True where two paths are, or would be, one file."""
    try:
        if one.exists() and other.exists():
            return one.samefile(other)  # a hard link too
        return one.resolve() == other.resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all, or a loop of links
        return False


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Give a private folder beside the outputs; what is left in it at the end is deleted.

    The folder lives on the outputs' file system, so that moving a file out of it is one rename.
    A process that is killed leaves its folder behind; it holds a lock while it lives, so the
    next run knows the folder to be dead and removes it.
    """
    stage = folder / f"{STAGING_PREFIX}{secrets.token_hex(8)}"
    with ExitStack() as last:
        last.callback(shutil.rmtree, stage, ignore_errors=True)  # an interrupt may come at any line
        try:
            with _lock_on(folder):  # nobody takes the new folder for an abandoned one
                _remove_abandoned(folder)
                stage.mkdir(mode=0o700)
                lock = os.open(stage, os.O_RDONLY)
                last.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"cannot write in {folder}: {error.strerror}") from error
        with no_room_reported(folder):
            yield stage


def apart(stage: Path) -> Path:
    """Give a folder in ``stage`` for what is not published: no output is called as it is."""
    return Path(tempfile.mkdtemp(dir=stage))


@contextmanager
def no_room_reported(folder: Path) -> Iterator[None]:
    """Report a full disk as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OutputError(
                f"no room left in {folder} ({error.strerror}); free some or choose another -o"
            ) from error
        raise


@contextmanager
def _lock_on(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def cache_folder() -> Path | None:
    """Give the folder of this package in the user's cache; it may not exist yet.

    None for a user without a home, as in a container that runs as a number.
    """
    # os.path's leaves a home that there is not as it is; Path's raises
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    if not Path(root).is_absolute():  # the XDG Base Directory Specification ignores such a path
        return None
    return Path(root) / "msn-export"


_PATIENCE = 10.0  # seconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a cache folder alone; a process that stopped while it has it is not waited for.

    Raises:
        TimeoutError: another process has it for too long.
    """
    lock = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + _PATIENCE
    try:
        while not _try_lock(lock):
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps the folder locked")
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file of a cache beside its place and move it there: it is whole or not there."""
    with tempfile.NamedTemporaryFile(
        prefix=f".{path.name}-", dir=path.parent, delete=False
    ) as file:
        try:
            file.write(content)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Remove what runs that were killed left in a folder."""
    try:
        with _lock_on(folder):
            _remove_abandoned(folder)
    except OSError:
        return  # the next run that writes there does


def _remove_abandoned(folder: Path) -> None:
    for stage in folder.glob(f"{STAGING_PREFIX}*"):
        try:
            lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # another run removed it first, or it is not ours to read
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner is alive
        else:
            shutil.rmtree(stage, ignore_errors=True)
        finally:
            os.close(lock)


def publish(
    staged: Path, output: Path, manifest: str, *, beside: Sequence[Path] = (), force: bool
) -> None:
    """Move a checked artifact to its place, then its manifest beside it.

    The old manifest stays until then: it has the old artifact's hash, so nobody takes it for the
    new one's, and an artifact is at no moment without any.

    ``beside`` are further files of the staging folder, which go to the output's under their names.
    """
    sidecar = manifest_path(output)
    staged_sidecar = manifest_path(staged)
    try:
        staged_sidecar.write_text(manifest, encoding="utf-8")
        targets = [output.with_name(file.name) for file in beside]
        with placing([output, sidecar, *targets], force=force):
            move(staged, output)
            for file, target in zip(beside, targets, strict=True):
                move(file, target)
            move(staged_sidecar, sidecar)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from error


@contextmanager
def placing(outputs: Sequence[Path], *, force: bool) -> Iterator[None]:
    """Have the outputs' folder alone while finished files are moved to their places.

    An interrupt waits until all of them are there.
    """
    with _interrupts_later(), _lock_on(outputs[0].parent):
        for output in outputs:
            if os.path.lexists(output) and not force:
                raise OutputError(
                    f"output {output} was written by another run meanwhile; --force replaces it, "
                    "-o writes elsewhere"
                )
        yield


_written: deque[Path] = deque(maxlen=100)  # by this process


def move(staged: Path, output: Path) -> None:
    """Move a finished file to its place; ``written`` names it from then on."""
    staged.replace(output)
    _written.append(output)


def written() -> tuple[str, ...]:
    """Name what this process has moved to its place and is there, the last hundred of it.

    What was moved within a staging folder is gone with that.
    """
    return tuple(dict.fromkeys(str(path) for path in _written if os.path.lexists(path)))


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: between two files of a set there is a mixed one."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda received, _frame: came.append(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def move_in(names: Sequence[str], stage: Path, folder: Path) -> None:
    """Move finished files and folders from ``stage`` into a folder, each by one rename.

    What they replace goes to ``stage``, and back if a later move fails. They come in their order:
    in a Triton repository a model before the ensemble that names it, so that a server that polls
    never sees the one without the other.
    """
    aside = stage / ".replaced"
    moved: list[str] = []
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        for name in names:
            target = folder / name
            if os.path.lexists(target):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                target.rename(aside / name)
            moved.append(name)
            (stage / name).rename(target)
            _written.append(target)
    except OSError as error:
        for name in reversed(moved):
            if (folder / name).exists():
                (folder / name).rename(stage / name)
            if os.path.lexists(aside / name):
                (aside / name).rename(folder / name)
        if is_new:
            folder.rmdir()
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
