"""A bundle arrives whole or is refused: pieces are hashed, cut and joined again."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import offline_bundle
import offline_recipes
import pytest
from offline_recipes import BESIDE, PACKAGE, SUITE, TREE
from packaging.requirements import Requirement

# comes with torch, onnx, onnxscript, transformers or scikit-image
BROUGHT = {"numpy", "ml-dtypes", "onnx", "sympy", "typing-extensions"}
UNPACK = Path(offline_bundle.__file__).with_name("offline_unpack.py")

needs_xz = pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Three pieces of a small tree."""
    site = tmp_path / "tree" / "site" / "package"
    site.mkdir(parents=True)
    (site / "library.so").write_bytes(bytes(range(256)) * 40)
    (site / "link.so").symlink_to("library.so")
    folder = tmp_path / "bundle"
    folder.mkdir()
    pieces = offline_bundle.pack(tmp_path / "tree", folder, 200, 0)
    about = {"recipe": "tensorrt-rtx", "python": "3.12", "pieces": pieces}
    (folder / "bundle.json").write_text(json.dumps(about))
    shutil.copy(UNPACK, folder / "unpack.py")
    return folder


def unpack(bundle: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", bundle / "unpack.py", target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_xz
def test_what_went_in_comes_out(bundle, tmp_path) -> None:
    assert len(list(bundle.glob("bundle.tar.xz.*"))) >= 3
    run = unpack(bundle, str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert f"export PYTHONPATH={tmp_path}/out/site" in run.stdout
    unpacked = tmp_path / "out" / "site" / "package"
    assert (unpacked / "library.so").read_bytes() == bytes(range(256)) * 40
    assert (unpacked / "link.so").readlink() == Path("library.so")


@needs_xz
@pytest.mark.parametrize("damage", ["missing", "cut", "altered", "elsewhere"])
def test_a_damaged_bundle_is_named_and_nothing_is_unpacked(bundle, damage, tmp_path) -> None:
    piece = bundle / "bundle.tar.xz.001"
    message = "piece bundle.tar.xz.001 is damaged"
    if damage == "missing":
        piece.unlink()
        message = "piece bundle.tar.xz.001 is missing"
    elif damage == "cut":
        piece.write_bytes(piece.read_bytes()[:-1])
    elif damage == "altered":
        content = piece.read_bytes()
        piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        about = json.loads((bundle / "bundle.json").read_text())
        about["pieces"][1]["name"] = "../bundle.json"
        (bundle / "bundle.json").write_text(json.dumps(about))
        message = "'../bundle.json', which lies elsewhere"
    run = unpack(bundle, str(tmp_path / "out"))
    assert run.returncode == 1
    assert message in run.stderr
    assert not (tmp_path / "out").exists()


@needs_xz
def test_the_same_content_gives_the_same_pieces(tmp_path) -> None:
    written = []
    for name in ("a", "b"):
        tree = tmp_path / name / "tree" / "site"
        tree.mkdir(parents=True)
        (tree / "x").write_bytes(b"content" * 1000)
        written.append(offline_bundle.pack(tree.parent, tmp_path / name, 100, 0))
    assert written[0] == written[1]


in_the_tree = pytest.mark.skipif(
    not (offline_recipes.TREE / "constraints.txt").is_file(), reason="the source tree is not here"
)


@in_the_tree
def test_what_a_suite_needs_is_pinned_as_it_was_tested() -> None:
    """All that is imported, but for what comes with the machine's own packages."""
    known = {pin.partition("==")[0].lower(): pin for pin in offline_recipes.pinned(BESIDE)}
    assert known["onnxsim"] == f"onnxsim=={version('onnxsim')}"
    for package in ("msn-export", *known):
        for line in requires(package) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                name = needed.name.lower().replace("_", "-")
                assert name in {*known, *BROUGHT}, f"{package} needs {name}"


@in_the_tree
def test_the_tree_is_copied_without_its_traces(tmp_path) -> None:
    offline_bundle.copy((*SUITE, *PACKAGE), tmp_path / "suite")
    assert os.access(tmp_path / "suite" / "scripts" / "card.sh", os.X_OK)
    copied = {path.name for path in (tmp_path / "suite").rglob("*")}
    assert {"conftest.py", "gpu.py", "pyproject.toml", "vit.py", "py.typed"} <= copied
    assert "__pycache__" not in copied


def test_the_command_that_runs_the_suite_is_told(bundle, tmp_path) -> None:
    (tmp_path / "out" / "suite").mkdir(parents=True)
    run = unpack(bundle, str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == (
        f"its tests: cd {tmp_path}/out/suite && PYTHONPATH={tmp_path}/out/site "
        "scripts/card.sh RESULTS"
    )


def test_every_recipe_is_pinned() -> None:
    for recipe in offline_bundle.RECIPES.values():
        assert all("==" in package for package in (*recipe.wheels, *recipe.sources))


def test_a_bundle_has_the_parts_of_one_cuda() -> None:
    for name, recipe in offline_bundle.RECIPES.items():
        parts = {part for one in (*recipe.wheels, *recipe.sources) for part in one.split("-")}
        cuda = {part.partition("==")[0] for part in parts} & {"cu12", "cu13"}
        wanted = {"cu12" if name.endswith("cu12") else "cu13"}
        assert cuda == (wanted if name.startswith("tensorrt-rtx") else set()), name


def test_no_fixture_has_the_name_of_a_plugins() -> None:
    """A machine has plugins that ours has not; pytest-benchmark ends the run over another's."""
    of_plugins = {"benchmark", "benchmark_weave", "mocker", "cov", "no_cover", "worker_id", "faker"}
    for file in Path(__file__).parent.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                is_fixture = any(mark.startswith("pytest.fixture") for mark in marks)
                assert not (is_fixture and node.name in of_plugins), f"{file.name}: {node.name}"


def python_3_10() -> str | None:
    """Find one that starts: a version manager may have the name and no such version."""
    found = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")]
    for one in map(str, filter(None, found)):
        done = subprocess.run([one, "-c", ""], capture_output=True, check=False)
        if done.returncode == 0:
            return one
    return None


@in_the_tree
@pytest.mark.skipif(python_3_10() is None, reason="there is no Python 3.10 here")
def test_python_3_10_gets_what_it_lacks(tmp_path) -> None:
    shutil.copy(TREE / "scripts" / "python_3_10.py", tmp_path / "sitecustomize.py")
    script = """
import enum, hashlib, io, typing
class Colour(enum.StrEnum):
    RED = enum.auto()
assert str(Colour.RED) == f"{Colour.RED}" == "red" == Colour("red")
whole = io.BytesIO(bytes(range(256)) * 4096)
assert hashlib.file_digest(whole, "sha256").digest() == hashlib.sha256(whole.getvalue()).digest()
def same(self: typing.Self) -> typing.Self: ...
"""
    done = subprocess.run(
        [str(python_3_10()), "-c", script], env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
