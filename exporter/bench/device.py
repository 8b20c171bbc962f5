"""How much of a GPU's memory a process holds."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT = 20.0  # seconds


def device_bytes(process: int) -> int | None:
    """Ask the driver's own tool; None where it is missing or cannot tell processes apart."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        # a fixed query to the tool that comes with the driver
        run = subprocess.run(  # noqa: S603
            [tool, *query], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in run.stdout.splitlines():
        owner, _, used = (part.strip() for part in line.partition(","))
        if owner == str(process) and used.isdigit():
            return int(used) * 2**20
    return None
