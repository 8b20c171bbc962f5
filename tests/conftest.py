"""What several tests share: photographs, and a tiny checkpoint with the graphs made from it."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import photographs as photographs_script
import real_bindings

# the same examples each time, and no clock: the machine may be busy
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


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
