"""The photographs of the quick start are copied, or one line says what to install."""

import re
import subprocess
import sys
from pathlib import Path

import photographs
import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(photographs.__file__)
WITHOUT = "import runpy, sys; sys.modules['skimage'] = None; sys.argv = sys.argv[1:]; "
WITHOUT += "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_sixteen_photographs_are_copied(tmp_path) -> None:
    done = run(str(SCRIPT), str(tmp_path / "a" / "photographs"))
    assert done.returncode == 0
    assert done.stdout.startswith("16 photographs of scikit-image ")
    assert len(list((tmp_path / "a" / "photographs").iterdir())) == 16


def test_without_scikit_image_one_line_says_what_to_install(tmp_path) -> None:
    done = run("-c", WITHOUT, str(SCRIPT), str(tmp_path / "photographs"))
    assert done.returncode == 1
    assert done.stderr == (
        "scikit-image, which has the photographs, is not installed; pip install scikit-image\n"
    )
    assert not (tmp_path / "photographs").exists()


def test_without_a_folder_the_usage_is_shown() -> None:
    done = run(str(SCRIPT))
    assert done.returncode == 2
    assert "usage: photographs.py [-h] folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="there are no docs here")
def test_readme_says_where_its_pictures_come_from() -> None:
    """Each folder that its first commands read is written by a command, or is the reader's own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "--images photographs/" in readme
    assert "pip install scikit-image && python scripts/photographs.py photographs" in readme
    assert re.search(r"`random:vit-msn-small:0`", readme)
