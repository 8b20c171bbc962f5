"""A place to run: an NVIDIA card (``-m gpu``), or a rehearsal of this suite on the CPU."""

import os
from pathlib import Path

import pytest

from tests.gpu.places import FOUND, Place, Rehearsal


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> dict[str, Place]:
    """What was opened so far: a card's engines are built once a session."""
    return {"rehearsal": Rehearsal(tmp_path_factory.mktemp("rehearsal"), photographs)}


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    places: dict[str, Place],
    photographs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    """The place a test's parameter names; skipped with the reason where it is not to be had."""
    if request.param not in places:
        name = request.param.replace(" ", "-")
        kept = os.environ.get("MSN_EXPORT_CARD_FOLDER")  # of scripts/card.py: for several processes
        folder = Path(kept, name) if kept else tmp_path_factory.mktemp(name)
        folder.mkdir(parents=True, exist_ok=True)
        places[request.param] = FOUND[request.param](folder, photographs)
    return places[request.param]
