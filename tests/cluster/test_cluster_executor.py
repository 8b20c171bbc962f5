"""The executor of a cluster, on a stand-in for Ray that runs its actors in this process."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msn_export import runtime
from msn_export.cluster.cluster import Node, RayExecutor
from msn_export.cluster.storage import list_sources
from msn_export.embedding.inference import LocalExecutor, reading_of
from msn_export.embedding.job import EmbedJob
from msn_export.errors import DeviceError
from msn_export.feed import feed_of
from tests.builders.tiny_artifacts import classifier, pictures

COUNT, BATCH = 6, 4
BATCHES = [range(0, BATCH), range(BATCH, COUNT)]


class Dataset:
    """Records that classes are mapped over, each made once."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records, self._steps = records, []

    def map(self, kind: type, *, fn_constructor_args: tuple, **_options: object) -> "Dataset":
        self._steps.append((kind, fn_constructor_args))
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        actors = [kind(*arguments) for kind, arguments in self._steps]
        for record in self._records:
            yield reduce(lambda batch, actor: actor(batch), actors, record)
        for actor in actors:
            with suppress(AttributeError):
                actor._decoder.close()


@pytest.fixture
def ray(monkeypatch) -> ModuleType:
    ray, data, exceptions = (ModuleType(name) for name in ("ray", "ray.data", "ray.exceptions"))
    ray.data, ray.exceptions = data, exceptions
    ray.put = lambda value: value
    ray.get = lambda value, timeout=None: value
    ray.remote = lambda function: SimpleNamespace(
        options=lambda **share: SimpleNamespace(remote=function)
    )
    exceptions.GetTimeoutError, exceptions.RayError = TimeoutError, type("R", (Exception,), {})
    data.ActorPoolStrategy = SimpleNamespace
    context = SimpleNamespace()
    data.DataContext = SimpleNamespace(get_current=lambda: context)
    data.from_items = lambda records, override_num_blocks: Dataset(records)
    for module in (ray, data, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return ray


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("model"), "--batch", f"1:{BATCH}:8")


def test_its_rows_are_those_of_one_machine(ray, model, tmp_path) -> None:
    folder = pictures(tmp_path, COUNT, (2,))
    job = EmbedJob(model, folder, tmp_path / "out.npy", providers=("cpu",), workers=1)
    listing, store = list_sources(folder)
    executor = RayExecutor(job, listing, store, [Node(2)])
    assert executor.model.selftest.startswith("selftest passed")
    assert executor.cluster == "1 node, 2 CPUs, 0 GPUs: 1 actor of 1 CPU, 1 reader"
    feed = feed_of(model.name, executor.model.inputs, executor.model.manifest)
    reading = reading_of(model.name, executor.model.outputs, None)
    assert list(executor.rows(feed, reading, BATCH, [])) == []
    got = list(executor.rows(feed, reading, BATCH, BATCHES))
    with runtime.open_runner(model, providers=["cpu"], threads=1) as runner:
        wanted = list(LocalExecutor(listing, runner, "", 1).rows(feed, reading, BATCH, BATCHES))
    for (start, rows), (other_start, other) in zip(got, wanted, strict=True):
        assert start == other_start
        np.testing.assert_array_equal(rows.vectors, other.vectors)
        np.testing.assert_array_equal(rows.best, other.best)
        assert rows.errors == other.errors


def test_a_failure_of_an_actor_comes_after_the_rows_before_it(
    ray, model, tmp_path, monkeypatch
) -> None:
    folder = pictures(tmp_path, COUNT)
    job = EmbedJob(model, folder, tmp_path / "out.npy", providers=("cpu",), workers=1)
    executor = RayExecutor(job, *list_sources(folder), [Node(2)])
    feed = feed_of(model.name, executor.model.inputs, executor.model.manifest)
    reading = reading_of(model.name, executor.model.outputs, None)

    class Failing(RayExecutor.embedder):
        def run(self, record):
            if record["start"]:
                raise DeviceError("GPU 0 is lost")
            return super().run(record)

    monkeypatch.setattr(RayExecutor, "embedder", Failing)
    rows = executor.rows(feed, reading, BATCH, BATCHES)
    assert next(rows)[0] == 0
    with pytest.raises(DeviceError, match="GPU 0 is lost"):
        next(rows)
