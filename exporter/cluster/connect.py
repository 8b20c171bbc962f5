"""To a Ray cluster and away from it, with Ray's failures as one line."""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from msn_export.cluster.capacity import Node
from msn_export.errors import ClusterError, MissingPackageError, MsnExportError
from msn_export.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LOCAL = "local"
_ANSWER = 10.0  # seconds until a cluster's machine takes a connection
# Ray Data 2.60 adds this, and advice on its settings, to the message of whatever was raised
_REMARK = re.compile(r"\nFailed to .* after \d+/\d+ attempts.*", re.DOTALL)


def address_of(given: str, variables: Mapping[str, str] = os.environ) -> str:
    """Read what ``--ray`` was given; nothing is the cluster a submitted job runs in, else local.

    Raises:
        ClusterError: it is no address, or a Ray Client's, which Ray Data does not run through.
    """
    # never None: Ray would then join whatever cluster was started last, or look for a dead one
    address = given or variables.get("RAY_ADDRESS") or LOCAL
    if "://" in address:
        raise ClusterError(
            f"--ray {address}: Ray Data runs inside the cluster; give HOST:PORT on one of its "
            "machines, or submit the command with ray job submit"
        )
    host, _, port = address.rpartition(":")
    if address not in {LOCAL, "auto"} and not (host and port.isdigit()):
        raise ClusterError(f"--ray {address}: expected HOST:PORT, auto, or local")
    return address


@contextmanager
def connected(address: str) -> Iterator[tuple[Node, ...]]:
    """Join a cluster, or start one on this machine; give its nodes. It is left at the end.

    Raises:
        MissingPackageError: Ray is not installed.
        ClusterError: there is no cluster at the address, or one of another Ray or Python.
    """
    # before Ray is imported: it reports its use to its makers unless it is told not to
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackageError(
            f"--ray needs Ray Data ({error}); pip install 'msn-export[ray]'"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": len(usable_cores()), "include_dashboard": False}
    try:
        _require_answer(address)
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"--ray {address}: no cluster that can be joined ({first_line(error)}); start one "
            "with ray start --head, use --ray local, or set RAY_AUTH_MODE=token if it asks for one"
        ) from error
    try:
        with failures_in_one_line():
            yield _nodes(ray.nodes())
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Look whether anybody listens: Ray asks for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()


def _nodes(found: list[dict[str, Any]]) -> tuple[Node, ...]:
    alive = [node["Resources"] for node in found if node["Alive"]]
    return tuple(Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in alive)


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Give an error of ours that was raised on another machine as it was raised there.

    Raises:
        ClusterError: of Ray's own failures.
    """
    from ray.exceptions import RayError

    try:
        yield
    except (MsnExportError, RayError, RuntimeError, ImportError) as error:
        own = own_error_in(error)
        if own is error:
            raise
        if own is not None:
            raise own from error
        raise ClusterError(f"Ray failed: {first_line(error)}") from error


def own_error_in(error: BaseException) -> MsnExportError | None:
    """Find our error among the causes of one of Ray's, which tells whole tracebacks."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        # Ray's own subclass of our error has its remote traceback for a message
        if isinstance(one, MsnExportError) and not hasattr(one, "cause"):
            text, remark = _REMARK.subn("", str(one))
            return type(one)(text) if remark else one
        waiting += [getattr(one, "cause", None), one.__cause__, one.__context__]
    return None


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says, or its type's name."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray colours its messages
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
