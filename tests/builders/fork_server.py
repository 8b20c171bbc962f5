"""Command lines in children of one process that has imported everything: a crash costs one case.

``python -m tests.builders.fork_server`` is that process. It has run nothing, so that no thread of
its libraries holds a lock that a child would wait for; a run takes the time of its work, not that
of the imports.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

_ROOT = Path(__file__).parents[2]
_STEP = 0.005  # seconds between two looks at a child


class Outcome(NamedTuple):
    """The end of a run; ``code`` is negative for a signal, None where the run hung."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    peak_rss: int

    @property
    def last(self) -> str:
        return self.stderr.strip().rpartition("\n")[2]


COUNTS = "RELIABILITY_COUNTS"  # names the file that ``count`` adds a line of JSON to


def count(kind: str, outcome: Outcome, left: int) -> None:
    """Add a case to those that docs/reliability.md counts; ``left`` files were not removed."""
    if COUNTS in os.environ:
        line = {"kind": kind, "code": outcome.code, "left": left}
        line["unexpected"] = "error: unexpected" in outcome.stderr or "Traceback" in outcome.stderr
        with Path(os.environ[COUNTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ForkServer:
    """Runs ``msn-export`` with arguments; on the way out of its ``with`` it is dead."""

    def __enter__(self) -> Self:
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.builders.fork_server"],
            cwd=_ROOT,
            env={**os.environ, **single},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        *arguments: object,
        cwd: Path,
        timeout: float = 60.0,
        memory: int | None = None,
        before: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a command line.

        Args:
            arguments: those behind ``msn-export``.
            cwd: the folder to run in.
            timeout: seconds after which it is killed.
            memory: bytes of address space that it may have.
            before: ``module:function`` to call first, as one that plants a fault.
            environment: variables to set besides.
        """
        line = {
            "arguments": [os.fsencode(str(one)).hex() for one in arguments],
            "cwd": str(cwd), "timeout": timeout, "memory": memory, "before": before,
            "environment": dict(environment or {}),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))


def main() -> None:
    _import_everything()
    answers = os.fdopen(os.dup(1), "w")
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _import_everything() -> None:
    import msn_export

    for module in pkgutil.walk_packages(msn_export.__path__, "msn_export."):
        if module.name not in {"msn_export.__main__"} and ".cluster.serve" not in module.name:
            importlib.import_module(module.name)
    libraries = ("onnx", "onnxsim", "PIL.Image", "onnxruntime", "rich.table", "onnx.checker")
    for name in (*libraries, "sklearn.linear_model", "sklearn.model_selection"):
        importlib.import_module(name)


def _run(request: Mapping[str, Any]) -> Outcome:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_child(request, out.fileno(), err.fileno())
        code, peak = _wait(child, started + request["timeout"])
        seconds = time.monotonic() - started
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        return Outcome(code, texts[0], texts[1], seconds, peak)


def _wait(child: int, until: float) -> tuple[int | None, int]:
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return None, usage.ru_maxrss * 1024
        time.sleep(_STEP)


def _be_child(request: Mapping[str, Any], out: int, err: int) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(request["cwd"])
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
            os.dup2(descriptor, number)
        if request["memory"] is not None:
            resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        sys.stdin = os.fdopen(0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        os.environ.update(request["environment"])
        arguments = [os.fsdecode(bytes.fromhex(one)) for one in request["arguments"]]
        sys.argv = ["msn-export", *arguments]
        if request["before"]:
            pkgutil.resolve_name(request["before"])()
        from msn_export.cli import main as command

        try:
            command(arguments, prog_name="msn-export")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  as the interpreter ends with one
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
