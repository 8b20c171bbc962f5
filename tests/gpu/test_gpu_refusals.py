"""What does not belong on a card is refused, for real and before it is run."""

import shutil
from dataclasses import replace

import pytest

from msn_export import manifest
from msn_export.errors import ManifestError, MsnExportError, RunnerError
from msn_export.runtime import open_runner
from msn_export.spec import ComputeCapability, Dtype
from tests.gpu.places import CARD, Place

pytestmark = pytest.mark.parametrize("place", [CARD], indirect=True)


@pytest.fixture
def engine(place: Place, tmp_path):
    """A copy of an engine that runs here, with its manifest."""
    built = place.build("vit-msn-small", Dtype.FP16).artifact
    for file in (built, manifest.manifest_path(built)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / built.name


def test_an_engine_for_another_generation_is_refused_with_the_command(place, tmp_path) -> None:
    if not place.backend.row.targets_capabilities:
        pytest.skip(f"{place.backend} compiles for the card it runs on")
    ada, turing = ComputeCapability(8, 9), ComputeCapability(7, 5)
    other = ada if place.device.capability == turing else turing
    graph = str(place.master("vit-msn-small"))
    place.run(
        tmp_path / "other.engine", "trt", graph, "--fp16", "--no-check",
        "--backend", place.backend.name, "--compute-capability", str(other),
    )  # fmt: skip
    with pytest.raises(RunnerError, match=rf"for SM {other}; here is .* rebuild it with: msn-"):
        open_runner(tmp_path / "other.engine")


def test_an_engine_of_another_version_is_refused_with_the_command(engine) -> None:
    read = manifest.read(engine)
    assert read is not None
    assert read.engine is not None
    record = replace(read.engine, version="10.0.0.1")
    manifest.manifest_path(engine).write_text(manifest.seal(replace(read, engine=record)))
    with pytest.raises(MsnExportError, match=r"10\.0\.0\.1"):
        open_runner(engine)


def test_a_changed_engine_is_refused(engine) -> None:
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(ManifestError, match="is not the file its manifest describes"):
        open_runner(engine)


@pytest.mark.parametrize("keep", [100, 10_000, 1_000_000])
def test_a_trusted_engine_that_was_cut_is_an_error_and_no_crash(engine, keep) -> None:
    engine.write_bytes(engine.read_bytes()[:keep])
    manifest.manifest_path(engine).unlink()
    with pytest.raises(MsnExportError) as raised:
        open_runner(engine, trust=True)
    assert "\n" not in str(raised.value)


def test_a_card_that_is_not_there_is_named(engine) -> None:
    with pytest.raises(RunnerError, match="99"):
        open_runner(engine, device=99)
