"""Run the tests against the built wheel, in an environment without the source tree.

The environment sees the packages of .venv through a path file; Python does not follow the editable
install's own path file from there, so ``msn_export`` can only come from the wheel.

First every file in the wheel is compared with the tree's: where none is missing, foreign or
different, the tests that pass from the tree have passed for this code, and what is left to prove is
that the wheel works as it is installed. ``--packaged`` runs the tests of that alone: the command
line from checkpoint to embeddings, each command's imports, the templates. Other arguments are
pytest's; without any, all tests run.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ENVIRONMENT = Path("build/wheel")
SOURCES = {"exporter": "msn_export", "models": "msn_export/models",
           "calibration": "msn_export/calibration"}  # fmt: skip
DOCUMENTATION = "share/doc/msn-export"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
SUFFIXES = {".md", ".json", ".png", ".svg"}  # of docs/: the site's own files stay in the tree
# What the wheel could get wrong although its files are the tree's: entry point, extras, imports
# under their installed names, data files
PACKAGED = ("tests/contracts/test_architecture.py", "tests/cli/test_commands.py",
            "tests/commands/test_embed.py", "tests/commands/test_embed_resume.py",
            "tests/commands/test_embed_refusals.py", "tests/commands/test_triton.py",
            "tests/reporting/test_bench.py")  # fmt: skip


def differences(wheel: Path) -> list[str]:
    """Name the files in which a wheel and the tree differ; metadata aside."""
    with zipfile.ZipFile(wheel) as packed:
        have = {
            re.sub(r"^[^/]+\.data/data/", "", name): packed.read(name)
            for name in packed.namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }
    wanted = {
        f"{package}/{path.relative_to(folder)}": path.read_bytes()
        for folder, package in SOURCES.items()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    pages = [Path(name) for name in PAGES]
    pages += [path for path in Path("docs").rglob("*") if path.suffix in SUFFIXES]
    wanted |= {f"{DOCUMENTATION}/{page}": page.read_bytes() for page in pages if page.is_file()}
    return sorted(name for name in have.keys() | wanted if have.get(name) != wanted.get(name))


def main() -> int:
    """Install the one wheel in dist/ and run pytest from a copy of tests/; give its exit code."""
    (wheel,) = Path("dist").glob("*.whl")
    different = differences(wheel)
    if different:
        print(f"{wheel.name} is not the tree: {', '.join(different)}", file=sys.stderr)
        return 1
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT / "venv", with_pip=True)
    python = (ENVIRONMENT / "venv/bin/python").absolute()
    (packages,) = (ENVIRONMENT / "venv/lib").glob("python*/site-packages")
    (packages / "development.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel],
        check=True,
    )
    tree = ENVIRONMENT / "tree"
    for name in ("tests", "scripts", "examples", "pyproject.toml"):
        source = Path(name)
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    where = "import msn_export; print(msn_export.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=tree, check=True, capture_output=True, text=True
    ).stdout.strip()
    if not found.startswith(str(packages.absolute())):
        print(f"msn_export was imported from {found}, not from the wheel", file=sys.stderr)
        return 1
    print(f"testing {wheel.name} at {Path(found).parent}")
    chosen = [
        one for given in sys.argv[1:] for one in (PACKAGED if given == "--packaged" else [given])
    ]
    return subprocess.run([python, "-m", "pytest", *chosen], cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
