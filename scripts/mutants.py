"""Plant small faults in the core, one at a time, and list those that no test notices.

``python scripts/mutants.py [WHERE …] --count 200 --seed 0 --processes 2 --kind "argument dropped"``

WHERE is a folder, a file or a line below the package (``graph``, ``graph/fuse.py``,
``graph/fuse.py:90``); default the core.
Faults are drawn by the seed. Each is tried in a throw-away copy, never in the checkout, against the
tests of its module: the ``--files`` nearest, the file of its name first, then those that import it,
then those of its importers. Of these, a file that never enters the function of the fault is left
out. A test file that fails without a fault, or takes longer than ``--longest``, takes no part, and
is listed. Whether a survivor is equivalent is for a person to judge: its difference is printed.
Most faults fall to the nearest file: ``--files 1`` is quick, and leaves a few lines to try again.
"""

import argparse
import ast
import difflib
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

from mutations import Mutation, mutations_of

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
CORE = ("metrics", "graph", "engine", "calibration", "runtime", "models")
_SOURCES = {"calibration": "calibration", "models": "models"}  # the rest lies in exporter/
# imported once, before each run is forked: half of a small test's time
_HEAVY = ("numpy", "torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "transformers",
          "transformers.models.vit_msn.modeling_vit_msn", "skimage.data", "pytest",
          "safetensors.torch", "PIL.Image", "click.testing", "rich.table")  # fmt: skip
_STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn")  # Python's audit events
MEMORY = 16 * 2**30  # bytes of address space: a fault may ask for any number
PASSED, FAILED = 0, 1  # pytest's exit codes; others say that it could not run the tests


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault in a module; ``module`` is its path below the package, ``source`` what it holds."""

    module: str
    source: bytes
    mutation: Mutation

    def __str__(self) -> str:
        return f"{self.module}:{self.mutation.line} {self.mutation.kind}"

    @property
    def difference(self) -> str:
        """The fault as a patch."""
        lines = difflib.unified_diff(
            self.source.decode().splitlines(),
            self.mutation.apply(self.source).decode().splitlines(),
            self.module,
            self.mutation.kind,
            lineterm="",
            n=2,
        )
        return "\n".join(lines)


def source_of(module: str) -> Path:
    """Find a module of the package in the checkout."""
    folder = module.partition("/")[0]
    return ROOT / module if folder in _SOURCES else ROOT / "exporter" / module


def modules_in(where: str) -> list[str]:
    """List the modules of a folder, or a file alone.

    Raises:
        SystemExit: there is none.
    """
    place = source_of(where)
    paths = [place] if place.is_file() else sorted(place.rglob("*.py"))
    if not paths:
        sys.exit(f"{where} is neither a folder nor a file of the package")
    return [where if path == place else f"{where}/{path.relative_to(place)}" for path in paths]


def draw(where: Sequence[str], kind: str | None, count: int, seed: int) -> list[Mutant]:
    """Draw faults, each place as likely as any other; fewer where some do not compile."""
    places = [one.partition(":") for one in where]
    lines = {(module, int(line or 0)) for place, _, line in places for module in modules_in(place)}
    sources = {module: source_of(module).read_bytes() for module in sorted({m for m, _ in lines})}
    every = [
        Mutant(module, source, mutation)
        for module, source in sources.items()
        for mutation in mutations_of(source)
        if kind in {None, mutation.kind} and lines & {(module, 0), (module, mutation.line)}
    ]
    chosen = random.Random(seed).sample(every, min(count, len(every)))  # noqa: S311  not a secret
    compiling = (one for one in chosen if one.mutation.compiles(one.source))
    return sorted(compiling, key=lambda one: (one.module, one.mutation.start))


@functools.cache
def imported_by(path: Path) -> set[str]:
    """List the modules of the package that a file imports, as paths below it.

    A test imports what its builders and fakes import, too.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            shared = ROOT / (name.replace(".", "/") + ".py")
            if name.startswith("msn_export."):
                found.add(name.removeprefix("msn_export.").replace(".", "/") + ".py")
            elif name.startswith("tests.") and shared.is_file():
                found |= imported_by(shared)
    return found


@functools.cache
def tests_of(module: str) -> list[str]:
    """Name the test files of a module, nearest first.

    Its own and those that import it; then the same of its importers, and of theirs. Of each, the
    tests of whole commands come last: they take longest.
    """
    files = sorted(TESTS.rglob("test_*.py"))
    near: dict[str, None] = {}
    modules = {module}
    for _ in range(3):
        paths = [Path(one) for one in sorted(modules)]
        stems = [str(TESTS / path.parent / f"test_{path.stem}_") for path in paths]
        own = [
            path for stem in stems for path in files if f"{path.with_suffix('')}_".startswith(stem)
        ]
        found = [*own, *(path for path in files if modules & imported_by(path))]
        found.sort(key=lambda path: path.parent.name in {"commands", "contracts"})
        near |= dict.fromkeys(str(path.relative_to(TESTS)) for path in found)
        modules = {user for one in modules for user in importers(one)}
    return list(near)


def importers(module: str) -> set[str]:
    """List the modules that import one."""
    return {
        str(path.relative_to(ROOT)).removeprefix("exporter/")
        for folder in ("exporter", "models", "calibration")
        for path in (ROOT / folder).rglob("*.py")
        if module in imported_by(path)
    }


class Copy:
    """A copy of the checkout whose package is imported instead of the installed one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.package = folder / "checkout", folder / "package" / "msn_export"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode().split("\0")  # fmt: skip
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        self.package.parent.mkdir()
        shutil.copytree(self.folder / "exporter", self.package)
        for part, source in _SOURCES.items():
            shutil.copytree(self.folder / source, self.package / part)

    def run(self, test: str, timeout: float, *, watched: bool = False) -> int | None:
        """Run a test file in a process of its own, to the first failure; None out of time.

        Where it is ``watched``, ``entered`` gives the functions that it entered afterwards.
        """
        pid = os.fork()
        if not pid:
            self._test(test, watched=watched)
        os.setpgid(pid, pid)  # the child does the same: whichever comes first
        until, done = time.monotonic() + timeout, 0
        try:
            while time.monotonic() < until:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        finally:  # Ctrl-C too
            if not done:
                os.killpg(pid, signal.SIGKILL)  # with what it started
                os.waitpid(pid, 0)
        return None

    def entered(self) -> set[tuple[str, int]] | None:
        """Give module and first line of each function; None where other processes may have more."""
        found = json.loads((self.folder / "entered.json").read_text())
        return None if found is None else {(module, line) for module, line in found}

    def _test(self, test: str, *, watched: bool) -> None:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(self.folder)
        sink = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.environ["PYTHONPATH"] = str(self.package.parent)
        # a .pyc is known by its source's second and size, and a fault changes neither
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path[:1] = [str(self.package.parent)]
        import pytest

        watch = Watch(f"{self.package}/") if watched else None
        options = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider"]
        code = FAILED
        try:
            code = int(pytest.main([*options, f"tests/{test}"]))
        except BaseException:  # noqa: BLE001  nothing may leave it: it is a copy of the pool's process
            traceback.print_exc()
        finally:
            if watch is not None:
                (self.folder / "entered.json").write_text(json.dumps(watch.found()))
            sys.stdout.flush()
            os._exit(code)


class Watch:
    """The functions below a folder that this process enters from now on."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._found: set[tuple[str, int]] = set()
        self._starts_others = False
        sys.addaudithook(self._hear)
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def found(self) -> list[tuple[str, int]] | None:
        """List their modules and first lines; None where it started a process, which has more."""
        sys.settrace(None)
        if self._starts_others:
            return None
        inside = sorted(one for one in self._found if one[0].startswith(self._package))
        return [(name.removeprefix(self._package), line) for name, line in inside]

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> None:
        self._found.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    def _hear(self, event: str, _arguments: tuple[object, ...]) -> None:
        self._starts_others |= event in _STARTS


def function_at(source: bytes, line: int) -> int | None:
    """Give the first line of the innermost function whose body has the line; None outside."""
    found = None
    for node in ast.walk(ast.parse(source)):  # the outer before the inner
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.body[0].lineno <= line <= node.end_lineno:
                found = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return found


@dataclass(frozen=True, slots=True)
class Usual:
    """How a test file runs without a fault: how long, and the functions that it enters."""

    seconds: float
    entered: set[tuple[str, int]] | None

    def reaches(self, mutant: Mutant) -> bool:
        """Whether it can see the fault."""
        function = function_at(mutant.source, mutant.mutation.line)
        inside = function is None or self.entered is None
        return inside or (mutant.module, function) in (self.entered or ())


class Runner:
    """What a process of the pool holds: its copy, and how each test file runs without a fault."""

    def __init__(self, folder: Path, longest: float, files: int) -> None:
        self._copy = Copy(Path(tempfile.mkdtemp(dir=folder)))
        self._longest, self._files = longest, files
        self.usual: dict[str, Usual | None] = {}  # None: it takes no part

    def survives(self, mutant: Mutant) -> str:
        """Try a fault: ``killed``, ``survived``, or ``untested`` where no test file reaches it."""
        path = self._copy.package / mutant.module
        tried = False
        for name in tests_of(mutant.module)[: self._files]:
            usual = self._usual(name)
            if usual is None or not usual.reaches(mutant):
                continue
            tried = True
            try:
                path.write_bytes(mutant.mutation.apply(mutant.source))
                if self._copy.run(name, 20 + 3 * usual.seconds) != PASSED:
                    return "killed"
            finally:
                path.write_bytes(mutant.source)
        return "survived" if tried else "untested"

    def _usual(self, name: str) -> Usual | None:
        """Run a test file without a fault, once."""
        if name not in self.usual:
            started = time.monotonic()
            passed = self._copy.run(name, self._longest, watched=True) == PASSED
            seconds = time.monotonic() - started
            self.usual[name] = Usual(seconds, self._copy.entered()) if passed else None
        return self.usual[name]


_RUNNERS: list[Runner] = []  # of this process of the pool


def _start(folder: Path, longest: float, files: int) -> None:
    import importlib

    for name in _HEAVY:
        importlib.import_module(name)
    _RUNNERS.append(Runner(folder, longest, files))


def _try(mutant: Mutant) -> tuple[Mutant, str, set[str]]:
    found = _RUNNERS[0].survives(mutant)
    return mutant, found, {name for name, usual in _RUNNERS[0].usual.items() if usual is None}


def main() -> None:
    """Draw, try, and print the survivors and the figures of each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("where", nargs="*", default=CORE, help="folders, files or lines")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="faults of this kind alone")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--files", type=int, default=8, help="test files that a fault is tried on")
    parser.add_argument("--longest", type=float, default=120, help="seconds of a test file")
    parser.add_argument("--list", action="store_true", help="show the faults and try none")
    asked = parser.parse_args()
    mutants = draw(asked.where, asked.kind, asked.count, asked.seed)
    if not mutants:
        sys.exit("there is no place for such a fault")
    if asked.list:
        print("\n".join(one.difference for one in mutants))
        return
    results: Counter[tuple[str, str]] = Counter()
    left_out: set[str] = set()
    with (
        tempfile.TemporaryDirectory(prefix="msn-export-mutants-") as folder,
        ProcessPoolExecutor(
            asked.processes,
            get_context("spawn"),
            _start,
            (Path(folder), asked.longest, asked.files),
        ) as pool,
    ):
        try:
            for number, (mutant, found, without) in enumerate(pool.map(_try, mutants), 1):
                results[mutant.module.partition("/")[0], found] += 1
                left_out |= without
                print(f"{number}/{len(mutants)} {found} {mutant}", file=sys.stderr, flush=True)
                if found != "killed":
                    print(f"{found}: {mutant}\n{mutant.difference}\n", flush=True)
        except BaseException:  # Ctrl-C: what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for part in sorted({part for part, _ in results}):
        killed, of = results[part, "killed"], sum(n for (p, _), n in results.items() if p == part)
        print(f"{part}: {killed} of {of} killed")
    if left_out:
        print(f"took no part, failing or too long: {', '.join(sorted(left_out))}")


if __name__ == "__main__":
    main()
