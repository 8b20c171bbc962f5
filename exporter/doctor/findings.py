"""What is wrong with what is installed, and the one line that mends it."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.driver import Driver, NoDriver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from msn_export.doctor.packages import Wanted
    from msn_export.doctor.probe import Probe

# The first driver of each CUDA generation on Linux: CUDA Toolkit release notes, table 3
_FIRST_DRIVER = {11: "r450", 12: "r525", 13: "r580"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something installed that does not work; ``package`` is the one it shows in."""

    package: str
    what: str
    mend: str


def find_faults(
    packages: Sequence[Wanted],
    probes: Mapping[str, Probe],
    driver: Driver | NoDriver,
    providers: Mapping[str, Sequence[str]],
) -> tuple[Finding, ...]:
    """Find everything that is installed and broken.

    Args:
        packages: what the extras ask for.
        probes: of each module, whether it imports.
        driver: of the GPU.
        providers: of each module, the distributions that installed files of it.
    """
    found = list(_overwritten(packages, providers))
    told = {finding.package for finding in found}
    for package in packages:
        if package.version is None or package.name in told:
            continue
        probed = probes.get(package.module or "")
        if not package.fits:
            what = f"{package.version} is installed, {package.range} is needed"
            found.append(Finding(package.name, what, f"pip install {package.line}"))
        elif probed is not None and probed.fault is not None:
            found.append(Finding(package.name, probed.fault, _mend(package, probed.fault)))
        elif package.name == "cuda-bindings" and isinstance(driver, Driver):
            found += _needs_driver(package, driver)
    return tuple(found)


def module_providers() -> Mapping[str, Sequence[str]]:
    """Say of each module which distributions installed it."""
    return {
        module: sorted(set(names))
        for module, names in importlib.metadata.packages_distributions().items()
    }


def _overwritten(
    packages: Sequence[Wanted], providers: Mapping[str, Sequence[str]]
) -> Iterator[Finding]:
    """Find modules that two distributions wrote their files into, one over the other's."""
    for package in packages:
        module = package.module
        # of a namespace such as ``cuda`` each has a part; here the whole module is meant
        names = providers.get(module, ()) if module and "." not in module else ()
        if len(names) < 2 or package.version is None:
            continue
        yield Finding(
            package.name,
            f"{' and '.join(names)} both install the module {module}: each has overwritten files "
            "of the other, and what runs is a mixture",
            f"pip uninstall -y {' '.join(names)} && pip install {package.line}",
        )


def _needs_driver(package: Wanted, driver: Driver) -> Iterator[Finding]:
    needs, has = (int(text.split(".")[0]) for text in (package.version or "0", driver.cuda))
    if needs > has:
        release = _FIRST_DRIVER.get(needs, f"one of CUDA {needs}")
        yield Finding(
            package.name,
            f"{package.version} needs an NVIDIA driver {release} or later; the one here ends at "
            f"CUDA {driver.cuda}",
            f"update the NVIDIA driver to {release} or later",
        )


def _mend(package: Wanted, fault: str) -> str:
    """Give the line that mends a package that does not import."""
    again = f"pip install --force-reinstall --no-deps {package.line}"
    library = re.search(r"(lib(?:nvinfer|nvonnxparser|tensorrt)[\w.-]*)", fault)
    if library is None:
        return again
    if "rtx" in library[1]:
        return "pip install --force-reinstall --no-deps tensorrt-rtx-cu13-libs"
    # tensorrt-cu13-libs on PyPI holds no library: its installation downloads them
    return (
        "pip install --no-cache-dir --force-reinstall --no-deps tensorrt-cu13-libs, where the "
        "vendor's own index can be reached: that package is a stub that downloads the libraries"
    )
