"""A cluster without a place for the model, without Ray: what the command says of it."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from msn_export.cluster.cluster import Node, RayExecutor
from msn_export.cluster.storage import list_sources
from msn_export.embedding.job import EmbedJob
from msn_export.errors import ClusterError


class NoAnswerError(Exception):
    """Stands in for ray.exceptions.GetTimeoutError."""


@pytest.fixture
def busy(monkeypatch):
    """A Ray that has no place for a task; what was asked of it is kept."""
    ray, data, exceptions = (ModuleType(name) for name in ("ray", "ray.data", "ray.exceptions"))
    asked = {}

    def get(reference, timeout):
        asked["timeout"] = timeout
        raise NoAnswerError

    def options(**share):
        asked["share"] = share
        return SimpleNamespace(remote=lambda *arguments: arguments)

    ray.data, ray.exceptions, ray.get, ray.put = data, exceptions, get, lambda value: value
    ray.remote = lambda function: SimpleNamespace(options=options)
    exceptions.GetTimeoutError, exceptions.RayError = NoAnswerError, type("R", (Exception,), {})
    for module in (ray, data, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_a_cluster_that_is_busy_is_not_waited_for_without_end(busy, tmp_path) -> None:
    model, picture = tmp_path / "m.onnx", tmp_path / "a.png"
    model.write_bytes(b"x")
    picture.write_bytes(b"x")
    job = EmbedJob(model, tmp_path, Path("out.parquet"))
    with pytest.raises(ClusterError) as refused:
        RayExecutor(job, *list_sources(tmp_path), [Node(4)])
    assert str(refused.value) == (
        "no worker with 3 CPUs could open the model in 600 s; is the cluster busy with other jobs?"
    )
    assert busy == {"timeout": 600.0, "share": {"num_cpus": 3}}
