"""What this machine is, for reports and for whoever reads a timing."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from msn_export.driver import Driver, find_driver

_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor, usable cores, memory in bytes, system, and GPUs by name."""

    cpu: str
    cores: int
    threads_per_core: int
    memory: int
    system: str
    python: str
    gpus: tuple[str, ...] = ()
    cuda: str | None = None
    driver: str | None = None

    def __str__(self) -> str:
        gpus = f", {', '.join(self.gpus)}" if self.gpus else ""
        return f"{self.cores} cores of {self.cpu}, {self.memory / 2**30:.0f} GiB{gpus}"


def this_machine() -> Machine:
    """Describe this machine as far as this process may use it."""
    driver = find_driver()
    devices = driver.devices if isinstance(driver, Driver) else ()
    logical = usable_cores()
    return Machine(
        cpu=_cpu(),
        cores=physical_cores(),
        threads_per_core=max(1, round(len(logical) / physical_cores())),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=platform.platform(),
        python=platform.python_version(),
        gpus=tuple(
            f"{device.name} (SM {device.capability}, {device.memory / 2**30:.0f} GiB)"
            for device in devices
        ),
        cuda=driver.cuda if isinstance(driver, Driver) else None,
        driver=driver_release(),
    )


def usable_cores() -> frozenset[int]:
    """List the logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Count the cores behind ``usable_cores``: two threads of one core count once."""
    siblings = set()
    for core in usable_cores():
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text(encoding="ascii"))
        except OSError:
            siblings.add(str(core))
    return len(siblings)


def driver_release(path: Path = _NVIDIA) -> str | None:
    """Read the release of the NVIDIA driver, such as 580.95.05; None where it does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", text)
    return found[1] if found else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
