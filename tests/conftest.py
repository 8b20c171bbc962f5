"""What several tests share: photographs, and a tiny checkpoint with the graphs made from it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import photographs as photographs_script
import real_bindings


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen photographs of scikit-image."""
    folder = tmp_path_factory.mktemp("photographs")
    photographs_script.main(folder)
    return folder


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries that define what the real TensorRT modules link, and do nothing."""
    return real_bindings.make_stubs(tmp_path_factory.mktemp("stubs"))
