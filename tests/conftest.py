"""What several tests share: photographs, and a tiny checkpoint with the graphs made from it.

A fixture that needs torch imports it: with transformers it takes seconds of every pytest process.
"""

import os
from pathlib import Path

import photographs as photographs_script
import pytest
from click.testing import CliRunner
from hypothesis import settings

from msn_export.cli import main
from tests.contracts.on_a_card import (  # noqa: F401  hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_runtest_logstart,
    pytest_runtest_setup,
    pytest_sessionstart,
)
from tests.fakes import real_bindings

# the same examples each time, and no clock: the machine may be busy
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")

os.environ.pop("COLUMNS", None)  # xdist sets the width of its own terminal; tables would follow it


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


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vit-msn-small for images of 64 pixels, and a classifier."""
    from tests.builders.checkpoints import small

    return small(tmp_path_factory.mktemp("small") / "checkpoint")


@pytest.fixture(scope="session")
def small_graph(small_checkpoint: Path, photographs: Path) -> Path:
    """That checkpoint's fp32 graph, with its manifest; not to be changed."""
    output = small_checkpoint.parent / "small.onnx"
    options = ["--head", "cls", "--head", "logits", "--images", str(photographs)]
    result = CliRunner().invoke(main, ["onnx", str(small_checkpoint), "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained classifier of digits; not to be changed."""
    from tests.builders import digits

    return digits.kept(_models(request, tmp_path_factory))


@pytest.fixture(scope="session")
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the backbone trained without labels on digits; not to be changed."""
    from tests.builders import digits_backbone

    return digits_backbone.kept(_models(request, tmp_path_factory))


def _models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder where trained models stay between runs, if pytest has a cache."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("digits") if cache is not None else tmp_path_factory.mktemp("digits")
