"""Commands with Ray run where only their own loopback is, and nothing of theirs stays."""

import subprocess
import sys

import pytest
import ray_cluster

TRY = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listening:
    socket.create_connection(listening.getsockname()).close()
try:
    socket.create_connection(("192.0.2.1", 9), 5)
except OSError as error:
    print(error.strerror)
"""


def test_a_command_reaches_its_own_loopback_and_nothing_else() -> None:
    command = ray_cluster.alone([sys.executable, "-c", TRY])
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if "unshare" in run.stderr:
        pytest.skip(f"no network namespace can be made here ({run.stderr.strip()})")
    assert run.stdout == "Network is unreachable\n", run.stderr


@pytest.mark.parametrize("id", [0, 1000])
def test_a_user_who_is_not_root_maps_himself(monkeypatch, id) -> None:
    monkeypatch.setattr(ray_cluster.os, "geteuid", lambda: id)
    command = ray_cluster.alone(["true"])
    assert command[:2] == ["unshare", "--net"]
    assert ("--map-root-user" in command) == (id != 0)
    assert command[-1] == "true"
