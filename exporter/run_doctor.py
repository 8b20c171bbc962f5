"""The story of ``msn-export doctor``: what is here, what is broken, what each command can do."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export import __version__
from msn_export.doctor.abilities import COMPILER, Verdict, judge
from msn_export.doctor.findings import Finding, find_faults, module_providers
from msn_export.doctor.packages import wanted_packages
from msn_export.doctor.probe import probe_all
from msn_export.driver import NoDriver, find_driver
from msn_export.machine import Machine, this_machine, usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from msn_export.doctor.packages import Wanted
    from msn_export.doctor.probe import Probe
    from msn_export.progress import Progress

_COMPILERS = ("c++", "g++", "clang++")  # what torch.compile looks for


@dataclass(frozen=True, slots=True)
class PackageState:
    """One package of one or more extras: ``state`` is ok, missing or broken."""

    name: str
    range: str
    extras: tuple[str, ...]
    version: str | None
    state: str
    detail: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that the doctor found; ``healthy`` is that nothing installed is broken."""

    healthy: bool
    product: str
    location: str
    interpreter: str
    machine: Machine
    no_gpu: str | None
    packages: tuple[PackageState, ...]
    faults: tuple[Finding, ...]
    commands: tuple[Verdict, ...]


def run_doctor(commands: Iterable[str], progress: Progress) -> Diagnosis:
    """Examine this machine for everything that ``commands`` need.

    Raises:
        MissingPackageError: msn-export runs from a folder and was never installed.
    """
    with progress.step("look for a GPU"):
        driver = find_driver()
    packages = wanted_packages()
    modules = [package.module for package in packages if package.module is not None]
    with progress.step(f"import {len(modules)} packages, each in a process of its own"):
        probes = probe_all(modules, len(usable_cores()))
    faults = find_faults(packages, probes, driver, module_providers())
    compiler = any(shutil.which(name) for name in _COMPILERS)
    tools = {COMPILER: None if compiler else "apt-get install g++"}
    return Diagnosis(
        healthy=not faults,
        product=f"msn-export {__version__}",
        location=str(Path(__file__).parent),
        interpreter=sys.executable,
        machine=this_machine(),
        no_gpu=driver.reason if isinstance(driver, NoDriver) else None,
        packages=tuple(_state(package, probes, faults) for package in packages),
        faults=faults,
        commands=judge(commands, packages, faults, driver, tools),
    )


def _state(package: Wanted, probes: Mapping[str, Probe], faults: Iterable[Finding]) -> PackageState:
    state, detail = "ok", ""
    broken = [fault.what for fault in faults if fault.package == package.name]
    if package.version is None:
        state = "missing"
    elif broken:
        state, detail = "broken", "; ".join(broken)
    elif package.module is not None:
        detail = probes[package.module].fact
    if package.stand_in is not None:
        detail = f"{package.stand_in} in its place; {detail}"
    return PackageState(package.name, package.range, package.extras, package.version, state, detail)
