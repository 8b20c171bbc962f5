"""What the actors of a cluster do, without a cluster: rows equal those of one machine."""

import socket
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_export import __version__, runtime
from msn_export.cluster import cluster
from msn_export.cluster.cluster import Embedder, Opening, Reader, explore, require_same
from msn_export.cluster.storage import decode_pixels, decode_rows, list_sources, pack
from msn_export.embedding.inference import LocalExecutor, reading_of
from msn_export.errors import ClusterError, RunnerError, ToleranceError
from msn_export.feed import feed_of
from tests.builders.tiny_artifacts import classifier, pictures

COUNT, BATCH = 6, 4
OPENING = Opening(providers=("cpu",), threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("model"), "--batch", f"1:{BATCH}:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, (2,))


def test_the_model_is_known_before_all_open_it(model) -> None:
    found = explore(pack(model), OPENING)
    with runtime.open_runner(model, providers=["cpu"], threads=1) as runner:
        assert (found.name, found.inputs, found.outputs) == (
            runner.name, runner.inputs, runner.outputs
        )  # fmt: skip
        assert (found.batch, found.manifest) == (runner.batch, runner.manifest)
    assert found.version == __version__
    assert found.selftest.startswith("selftest passed")


def test_it_is_opened_with_kernels_that_stay_as_on_one_machine(model, monkeypatch) -> None:
    asked = {}

    def opened(path: Path, **options: object) -> runtime.Runner:
        asked.update(options)
        return runtime.open_runner(path, **options)

    monkeypatch.setattr(cluster, "open_runner", opened)
    explore(pack(model), OPENING)
    assert asked["eager_kernels"] is True


def test_a_worker_of_another_version_is_refused(model) -> None:
    known = explore(pack(model), replace(OPENING, check=False))
    require_same(known)
    with pytest.raises(ClusterError) as refused:
        require_same(replace(known, version="0.0.1"))
    assert str(refused.value) == (
        f"a worker has msn-export 0.0.1 and this machine {__version__}; install the same everywhere"
    )


def test_readers_and_embedders_make_the_rows_of_one_machine(model, folder) -> None:
    artifact = pack(model)
    known = explore(artifact, OPENING)
    found, store = list_sources(folder)
    feed = feed_of(model.name, known.inputs, known.manifest)
    reading = reading_of(model.name, known.outputs, None)
    batches = [range(0, BATCH), range(BATCH, COUNT)]
    records = [
        {"start": one.start, "sources": [bytes(path) for path in found.paths[one.start : one.stop]]}
        for one in batches
    ]
    reader = Reader(store, feed.preprocessing, 1, BATCH)
    embedder = Embedder(artifact, OPENING, known.name, feed, reading)
    with closing(reader._decoder):
        got = [decode_rows(embedder.run(reader(record))) for record in records]
    with runtime.open_runner(model, providers=["cpu"], threads=1) as runner:
        here = LocalExecutor(found, runner, "", 1)
        wanted = list(here.rows(feed, reading, BATCH, batches))
    for (start, rows), (other_start, other) in zip(got, wanted, strict=True):
        assert start == other_start
        np.testing.assert_array_equal(rows.vectors, other.vectors)
        np.testing.assert_array_equal(rows.best, other.best)
        assert rows.errors == other.errors
    assert sum(len(rows.errors) for _, rows in got) == 1


def test_a_broken_picture_is_black_on_its_way(model, folder) -> None:
    known = explore(pack(model), replace(OPENING, check=False))
    assert known.selftest == "none (--no-check)"
    found, store = list_sources(folder)
    feed = feed_of(model.name, known.inputs, known.manifest)
    reader = Reader(store, feed.preprocessing, 1, BATCH)
    with closing(reader._decoder):
        record = reader({"start": 0, "sources": [bytes(path) for path in found.paths]})
    _, batch = decode_pixels(record)
    assert batch.turned == 0
    (row,) = batch.errors
    assert "002.png is not a readable picture" in batch.errors[row]
    assert not batch.pixels[row].any()
    assert all(batch.pixels[other].any() for other in range(COUNT) if other != row)


def test_machines_that_run_the_model_by_something_else_are_refused(model) -> None:
    known = explore(pack(model), OPENING)
    feed = feed_of(model.name, known.inputs, known.manifest)
    reading = reading_of(model.name, known.outputs, None)
    with pytest.raises(ClusterError) as refused:
        Embedder(pack(model), OPENING, "onnxruntime 1.0, CUDA", feed, reading)
    assert str(refused.value) == (
        f"{socket.gethostname()} runs the model by {known.name}, another machine by onnxruntime "
        "1.0, CUDA: their rows would differ; give all the same packages and GPUs, or choose "
        "--providers"
    )


def test_a_model_that_cannot_run_there_says_so(model, monkeypatch) -> None:
    with pytest.raises(RunnerError, match="no NVIDIA driver"):
        explore(pack(model), Opening(providers=("cuda",)))
    failed = runtime.open_runner(model, providers=["cpu"]).selftest()
    monkeypatch.setattr(
        "msn_export.runtime.runner.Runner.selftest",
        lambda self: replace(failed, failures=("cosine",)),
    )
    with pytest.raises(ToleranceError, match="or run it all the same with --no-check"):
        explore(pack(model), OPENING)
