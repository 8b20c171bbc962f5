"""Addresses of clusters, and Ray's failures as one line; Ray itself is not needed."""

import socket
import sys
from types import ModuleType

import pytest

from msn_export.cluster import cluster
from msn_export.cluster.cluster import Node, address_of, connected, own_error_in
from msn_export.cluster.storage import first_line
from msn_export.errors import ClusterError, DeviceError, MissingPackageError


class RayError(Exception):
    """Stands in for Ray's."""


class FakeRay(ModuleType):
    """As much of Ray as joining a cluster takes."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("ray")
        self.failure, self.left, self.asked = failure, 0, None

    def init(self, address, **options):
        if self.failure is not None:
            raise self.failure
        self.asked = address, options

    def nodes(self):
        return [
            {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
            {"Alive": True, "Resources": {"CPU": 2.0}},
        ]

    def shutdown(self):
        self.left += 1


@pytest.fixture
def joined(monkeypatch):
    def join(failure: Exception | None = None) -> FakeRay:
        fake, data, exceptions = FakeRay(failure), ModuleType("data"), ModuleType("exceptions")
        fake.data, exceptions.RayError = data, RayError
        for name, module in (("", fake), (".data", data), (".exceptions", exceptions)):
            monkeypatch.setitem(sys.modules, f"ray{name}", module)
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
            monkeypatch.setenv(name, "0")
        return fake

    return join


def test_nothing_given_is_the_cluster_one_was_submitted_to_or_a_local_one() -> None:
    assert address_of("", {}) == "local"
    assert address_of("", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert address_of("local", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "local"


def test_a_ray_clients_address_is_refused() -> None:
    with pytest.raises(ClusterError) as refused:
        address_of("ray://head:10001", {})
    assert str(refused.value) == (
        "--ray ray://head:10001: Ray Data runs inside the cluster; give HOST:PORT on one of its "
        "machines, or submit the command with ray job submit"
    )


@pytest.mark.parametrize("address", ["head", "6379", ":6379", "head:", "head:ray", "Auto"])
def test_what_is_no_address_is_refused(address) -> None:
    with pytest.raises(ClusterError) as refused:
        address_of(address, {})
    assert str(refused.value) == f"--ray {address}: expected HOST:PORT, auto, or local"


@pytest.fixture
def port():
    """One that is listened at; nobody says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_an_address_where_nobody_listens_is_not_waited_for(joined) -> None:
    ray = joined()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    with pytest.raises(ClusterError) as refused, connected(f"127.0.0.1:{nobody}"):
        pass
    assert str(refused.value) == (
        f"--ray 127.0.0.1:{nobody}: no cluster that can be joined ([Errno 111] Connection "
        "refused); start one with ray start --head, use --ray local, or set RAY_AUTH_MODE=token "
        "if it asks for one"
    )
    assert ray.asked is None


def test_a_cluster_tells_its_living_nodes_and_is_left(joined, port) -> None:
    ray = joined()
    with connected(f"127.0.0.1:{port}") as nodes:
        assert nodes == (Node(4, 1), Node(2))
        assert ray.left == 0
    assert ray.left == 1
    address, options = ray.asked
    assert address == f"127.0.0.1:{port}"
    assert "num_cpus" not in options  # only a cluster of one's own is told what it has


def test_a_local_cluster_has_the_cores_of_this_process(joined, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "usable_cores", lambda: [0, 1, 2])
    ray = joined()
    with connected("local"):
        pass
    address, options = ray.asked
    assert (address, options["num_cpus"]) == ("local", 3)


def test_without_ray_the_line_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError) as refused, connected("local"):
        pass
    assert str(refused.value).startswith("--ray needs Ray Data (")
    assert str(refused.value).endswith("); pip install 'msn-export[ray]'")


@pytest.mark.parametrize("kind", [ConnectionError, RuntimeError, ValueError, OSError])
def test_a_cluster_that_is_not_there_is_one_line(joined, kind) -> None:
    joined(kind("\n  Ray runtime not found.\nA long story."))
    with pytest.raises(ClusterError) as refused, connected("auto"):
        pass
    assert str(refused.value) == (
        "--ray auto: no cluster that can be joined (Ray runtime not found.); start one "
        "with ray start --head, use --ray local, or set RAY_AUTH_MODE=token if it asks for one"
    )


def test_a_failure_of_rays_is_one_line_and_the_cluster_is_left(joined) -> None:
    ray = joined()
    with pytest.raises(ClusterError) as failed, connected("local"):
        raise RayError("\x1b[36mray::Map()\x1b[39m (pid=1)\n  File …\nboom")
    assert str(failed.value) == "Ray failed: ray::Map() (pid=1)"
    assert ray.left == 1


def test_our_error_of_another_machine_is_told_as_it_was_raised_there(joined) -> None:
    class OfTaskError(RayError, DeviceError):
        cause = DeviceError(
            "GPU 0 is lost\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s)."
            "\nTo change retry attempts, …"
        )

    joined()
    with pytest.raises(DeviceError) as failed, connected("local"):
        raise OfTaskError("ray::Map() (pid=1)\nTraceback …")
    assert str(failed.value) == "GPU 0 is lost"


def test_our_error_is_found_behind_any_number_of_rays() -> None:
    own = DeviceError("GPU 0 is lost\nits second line")
    middle, outer = RayError("middle"), RayError("outer")
    middle.__cause__, outer.__context__ = own, middle
    own.__context__ = outer  # a circle is no endless search
    assert own_error_in(outer) is own
    assert own_error_in(RayError("alone")) is None


def test_an_error_of_ours_in_this_process_stays_what_it_is(joined) -> None:
    joined()
    own = DeviceError("here")
    with pytest.raises(DeviceError) as failed, connected("local"):
        raise own
    assert failed.value is own


def test_an_error_without_a_text_is_its_type() -> None:
    assert first_line(RuntimeError("\n \n")) == "RuntimeError"
