"""Collect what a GPU machine without a network needs, in pieces small enough to carry.

    python scripts/offline_bundle.py tensorrt-rtx --output bundle/
    (there) python3 bundle/unpack.py /opt/msn-export-gpu

Recipes: ``tensorrt-rtx`` (1.6.1: the last that does not refuse SM 9.0 when it loads),
``tensorrt-rtx-cu12`` (the same, built for CUDA 12: for a driver that refuses what CUDA 13.4 generates),
``tensorrt-rtx-1.7`` (1.7.1: what the tests compile with; for GeForce and RTX cards), ``onnxruntime-gpu``, and
``tensorrt-8.6`` (8.6.0 with numpy, cuda-bindings and a CPython 3.10 of its own; g++ and a Python 3.10 are needed here).
All comes from PyPI. The bundle holds a folder ``site`` for PYTHONPATH, with msn-export itself and what it
needs beside the packages of a machine for machine learning (torch, transformers, onnx, onnxscript,
scikit-image, pytest are taken from there), and ``suite``, from which the GPU's tests and benchmark run. For
8.6, whose modules end at Python 3.10, there is ``python``, which runs msn-export's compiler and runner (scripts/tensorrt_8_6.py)
with what 3.10 lacks supplied (scripts/python_3_10.py).
Compressed with xz and cut into pieces, beside ``bundle.json`` with the SHA-256 of every piece, and
``unpack.py``, which checks them before it unpacks anything and prints the command that runs the suite.
Several bundles may be unpacked into one folder.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offline_recipes import BESIDE, PACKAGE, RECIPES, SUITE, TREE, Recipe, pinned

HERE = Path(__file__).parent
PIECE = 60 * 10**6  # bytes
# Tags that pip is to accept: glibc 2.17 to 2.28, the oldest that these wheels are built for
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 29)] + ["manylinux2014_x86_64"]


def fetch(recipe: Recipe, folder: Path) -> list[Path]:
    """Download the recipe's wheels from PyPI, and build msn-export's own."""
    wheels = (*recipe.wheels, *(pinned(BESIDE) if recipe.suite else ()))
    tags = [part for platform in PLATFORMS for part in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder,
         "--python-version", recipe.python, *tags, *wheels],
        check=True,
    )  # fmt: skip
    for source in recipe.sources:
        subprocess.run(
            [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source], check=True
        )
    with tempfile.TemporaryDirectory() as copied:  # a build leaves its traces in the tree
        copy(PACKAGE, Path(copied))
        subprocess.run(
            [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, copied], check=True
        )
    return sorted(folder.glob("*.whl"))


def copy(names: Iterable[str], target: Path) -> None:
    """Copy files and folders of the tree, without what running leaves in them."""
    target.mkdir(exist_ok=True)
    skipped = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in names:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, target / name, ignore=skipped)
        else:
            shutil.copy(TREE / name, target / Path(name).name)


def lay_out(recipe: Recipe, wheels: list[Path], tree: Path) -> None:
    """Unpack the wheels into ``tree/site``, stubs in place of what is dropped."""
    site = tree / "site"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if Path(n).name not in recipe.drop]
            archive.extractall(site, names)  # noqa: S202  zipfile keeps members inside
    for library in recipe.stubs:
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-O2", f"-Wl,-soname,{library}", "-o",
             site / "tensorrt" / library, HERE / "tensorrt_8_6_stubs.cpp"],
            check=True,
        )  # fmt: skip
    if recipe.interpreter:
        shutil.copy(HERE / "python_3_10.py", site / "sitecustomize.py")
        copy(("scripts/tensorrt_8_6.py",), tree / "run")
    if recipe.suite:
        copy(SUITE, tree / "suite")
        (tree / "suite" / "commit.txt").write_text(commit() + "\n")


def commit() -> str:
    """Give the tree's commit, for the results: there is no git where they are made."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    return subprocess.run(git, cwd=TREE, capture_output=True, text=True, check=True).stdout.strip()


@dataclass(frozen=True)
class Interpreter:
    """A CPython that still runs once its folder was moved."""

    version: str
    prefix: Path
    library: Path


def find_interpreter(version: str) -> Interpreter:
    """Find a CPython ``version`` on PATH or among pyenv's.

    Raises:
        SystemExit: there is none but a distribution's, which does not move.
    """
    found = shutil.which(f"python{version}")
    known = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    ask = "import sys, sysconfig; print(sys.base_prefix); print(sysconfig.get_path('stdlib'))"
    for binary in [*([found] if found else []), *reversed(known)]:
        run = subprocess.run([binary, "-c", ask], check=False, capture_output=True, text=True)
        if run.returncode == 0 and not run.stdout.startswith("/usr\n"):
            return Interpreter(version, *map(Path, run.stdout.split()))
    raise SystemExit(
        f"no python{version} here that can be moved; install one (pyenv does) and run this again"
    )


def copy_interpreter(found: Interpreter, target: Path) -> None:
    """Copy a CPython without its tests and packages."""
    (target / "bin").mkdir(parents=True)
    shutil.copy2(found.prefix / "bin" / f"python{found.version}", target / "bin")
    skipped = shutil.ignore_patterns("test", "tests", "idlelib", "site-packages", "__pycache__",
                                     "ensurepip", "tkinter", "lib2to3", "*.a")  # fmt: skip
    shutil.copytree(found.library, target / found.library.relative_to(found.prefix), ignore=skipped)
    for shared in (found.prefix / "lib").glob(f"libpython{found.version}.so*"):
        shutil.copy2(shared, target / "lib", follow_symlinks=False)


class Pieces:
    """A file to write into that becomes numbered pieces, each hashed as it is written."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.written: list[dict[str, str | int]] = []
        self._open: list[bytes] = []
        self._held = 0

    def write(self, data: bytes) -> int:
        """Take bytes; a full piece goes to disk."""
        rest = memoryview(data)
        while rest:
            part = rest[: self.size - self._held]
            self._open.append(bytes(part))
            self._held += len(part)
            rest = rest[len(part) :]
            if self._held == self.size:
                self.close_piece()
        return len(data)

    def close_piece(self) -> None:
        """Write what is held as the next piece."""
        if not self._held:
            return
        name = f"bundle.tar.xz.{len(self.written):03}"
        content = b"".join(self._open)
        (self.folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self.written.append({"name": name, "bytes": len(content), "sha256": digest})
        self._open, self._held = [], 0


def pack(tree: Path, folder: Path, size: int, preset: int) -> list[dict[str, str | int]]:
    """Compress ``tree`` with every core and cut the stream into pieces."""
    pieces = Pieces(folder, size)
    xz = ["xz", "--threads=0", f"-{preset}", "--stdout"]
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for path in sorted(tree.iterdir()):
                archive.add(path, path.name, filter=anonymous)
        stream.seek(0)
        with subprocess.Popen(xz, stdin=stream, stdout=subprocess.PIPE) as packed:
            assert packed.stdout is not None
            for block in read_blocks(packed.stdout):
                pieces.write(block)
    if packed.returncode:
        raise SystemExit(f"xz ended with {packed.returncode}")
    pieces.close_piece()
    return pieces.written


def read_blocks(stream) -> Iterator[bytes]:  # noqa: ANN001  a pipe
    """Read a stream to its end."""
    while block := stream.read(1 << 20):
        yield block


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who and when, so that the same content gives the same pieces."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main(arguments: list[str]) -> None:
    """Make a bundle."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--piece-size", type=int, default=PIECE, help="bytes; default 60 MB")
    parser.add_argument("--preset", type=int, choices=range(10), default=6, help="of xz")
    asked = parser.parse_args(arguments)
    recipe = RECIPES[asked.recipe]
    interpreter = find_interpreter(recipe.python) if recipe.interpreter else None
    asked.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=asked.output) as work:
        wheels = Path(work, "wheels")
        wheels.mkdir()
        tree = Path(work, "tree")
        found = fetch(recipe, wheels)
        lay_out(recipe, found, tree)
        if interpreter:
            copy_interpreter(interpreter, tree / "python")
        shutil.rmtree(wheels)
        written = pack(tree, asked.output, asked.piece_size, asked.preset)
    about = {
        "recipe": asked.recipe, "python": recipe.python,
        "packages": [path.name for path in found], "pieces": written,
    }  # fmt: skip
    (asked.output / "bundle.json").write_text(json.dumps(about, indent=2) + "\n")
    shutil.copy(HERE / "offline_unpack.py", asked.output / "unpack.py")
    size = sum(int(piece["bytes"]) for piece in written)
    print(f"{asked.recipe}: {len(written)} pieces, {size / 1e6:.1f} MB in {asked.output}")
    print(f"there: python3 {asked.output.name}/unpack.py FOLDER")


if __name__ == "__main__":
    main(sys.argv[1:])
