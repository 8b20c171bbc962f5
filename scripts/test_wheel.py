"""Run the tests against the built wheel, in an environment without the source tree.

The environment sees the packages of .venv through a path file; Python does not follow the editable
install's own path file from there, so ``msn_export`` can only come from the wheel.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ENVIRONMENT = Path("build/wheel")


def main() -> int:
    """Install the one wheel in dist/ and run pytest from a copy of tests/; give its exit code."""
    (wheel,) = Path("dist").glob("*.whl")
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
    for name in ("tests", "scripts", "pyproject.toml"):
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
    return subprocess.run([python, "-m", "pytest", *sys.argv[1:]], cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
