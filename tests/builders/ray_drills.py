"""What the drills on Ray share: where they run, and how they are bounded."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import ray_cluster
from click.testing import CliRunner

from msn_export.cli import main

DRILLS = Path(__file__).parent.parent / "data/ray_drills"
WITHIN = 300.0  # seconds, of one command; 20 to 40 on two free cores


@functools.cache
def missing() -> str:
    """Say why no drill can run here; nothing where they can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed: Ray would listen on every interface"
    tried = subprocess.run(ray_cluster.alone(["true"]), capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made here ({tried.stderr.strip()})"
    try:
        ray_cluster.environment()
    except subprocess.CalledProcessError as error:
        return f"Ray cannot be installed ({error})"
    return ""


def require_ray() -> None:
    """Skip where no drill can run."""
    if missing():
        pytest.skip(missing())


def drill(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run Python where Ray is; bounded, and nothing it started outlives it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ray_cluster.started(arguments, **pipes) as child:
        stdout, stderr = child.communicate(timeout=WITHIN)
        return subprocess.CompletedProcess(arguments, child.returncode, stdout, stderr)


def invoke(*arguments: object) -> None:
    """Run a command here, on one machine."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
