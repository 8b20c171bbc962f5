"""The steps of ``msn-export doctor``: what is here, what is broken, what each command can do."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from msn_export import __version__
from msn_export.commands.import_probe import ImportProbe, probe_all
from msn_export.errors import MissingPackageError
from msn_export.host import (
    Driver,
    Machine,
    NoDriver,
    find_driver,
    this_machine,
    usable_cores,
)
from msn_export.schema import Result
from msn_export.version_table import Client, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from importlib.metadata import Distribution

    from msn_export.progress import Progress


# The first driver of each CUDA generation on Linux: CUDA Toolkit release notes, table 3
_FIRST_DRIVER = {11: "r450", 12: "r525", 13: "r580"}


# Why an older release of a package does not do
_REASONS = {
    "onnxruntime-gpu": (
        "the CUDA provider of an older one has no kernel for Attention, which then runs on the CPU"
    )
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something installed that does not work; ``package`` is the one it shows in."""

    package: str
    what: str
    mend: str


def find_faults(
    packages: Sequence[Wanted],
    probes: Mapping[str, ImportProbe],
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
    shown = {finding.package for finding in found}
    for package in packages:
        if package.version is None or package.name in shown:
            continue
        probed = probes.get(package.module or "")
        if not package.fits:
            what = f"{package.version} is installed, {package.range} is needed"
            what += f": {_REASONS[package.name]}" if package.name in _REASONS else ""
            found.append(Finding(package.name, what, f"pip install {package.line}"))
        elif probed is not None and probed.fault is not None:
            found.append(Finding(package.name, probed.fault, _mend(package, probed.fault)))
        elif package.name == "cuda-bindings" and isinstance(driver, Driver):
            found += _needs_driver(package, driver)
    return tuple(found)


def module_providers() -> Mapping[str, Sequence[str]]:
    """List for each module the distributions that installed it."""
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


COMPILER = "a C++ compiler"


@dataclass(frozen=True, slots=True)
class Ability:
    """Something a command does; ``extras``, ``tool`` and ``gpu`` are what it needs for that."""

    command: str
    does: str
    extras: tuple[str, ...] = ()
    gpu: bool = False
    tool: str | None = None


ABILITIES = (
    Ability("onnx", "checkpoint to ONNX graph", ("export",)),
    Ability("fit", "a classifier of labelled pictures", ("fit",)),
    Ability("trt", "compile with TensorRT-RTX", ("graph", "rtx")),
    Ability("trt", "compile with TensorRT", ("graph", "tensorrt"), gpu=True),
    Ability("calibrate", "fp32 graph to int8 or fp8", ("graph",)),
    Ability("validate", "compare two graphs or engines", ("graph",)),
    Ability("validate", "compare with a checkpoint", ("export",)),
    Ability("drift", "compare block by block", ("graph",)),
    Ability("drift", "compare with a checkpoint", ("export",)),
    Ability("report", "write a page", ("graph", "report")),
    Ability("inspect", "read any artifact", ("graph",)),
    Ability("bench", "time an .onnx file", ("ort",)),
    Ability("bench", "--providers openvino", ("ort", "openvino")),
    Ability("bench", "against PyTorch", ("export",)),
    Ability("bench", "--against compile", ("export",), tool=COMPILER),
    Ability("bench", "--report", ("ort", "report")),
    Ability("bench", "time an engine of TensorRT-RTX", ("ort", "rtx"), gpu=True),
    Ability("bench", "time an engine of TensorRT", ("ort", "tensorrt"), gpu=True),
    Ability("embed", "an .onnx file", ("ort",)),
    Ability("embed", "an .onnx file in OpenVINO", ("openvino",)),
    Ability("embed", "an .onnx file on a GPU", ("ort",), gpu=True),
    Ability("embed", "an engine of TensorRT-RTX", ("ort", "rtx"), gpu=True),
    Ability("embed", "an engine of TensorRT", ("ort", "tensorrt"), gpu=True),
    Ability("embed", "to .parquet", ("ort", "parquet")),
    Ability("embed", "to .usearch", ("search",)),
    Ability("search", "an index", ("search",)),
    Ability("search", "write a page", ("graph", "search", "report")),
    Ability("evaluate", "an .onnx file or an engine", ("ort",)),
    Ability("evaluate", "an .onnx file in OpenVINO", ("openvino",)),
    Ability("evaluate", "a checkpoint", ("export",)),
    Ability("triton", "write or check a model repository", ("graph", "triton")),
    Ability("hub", "a folder for optimum and transformers.js", ("export",)),
    Ability("doctor", "this"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that a command can do; ``mend`` is what it takes where it cannot."""

    command: str
    does: str
    works: bool
    mend: str


def decide(
    commands: Iterable[str],
    packages: Sequence[Wanted],
    faults: Sequence[Finding],
    driver: Driver | NoDriver,
    tools: Mapping[str, str | None],
) -> tuple[Verdict, ...]:
    """Judge everything the commands do.

    Args:
        commands: those that there are, in order.
        packages: what the extras ask for and what is installed.
        faults: what is installed and broken.
        driver: of the GPU.
        tools: of each tool that an ability names, the line that installs it; None where it is here.
    """
    verdicts = []
    for command in commands:
        for ability in (row for row in ABILITIES if row.command == command):
            needs = list(_needs(ability, packages, faults, driver, tools))
            verdicts.append(Verdict(command, ability.does, not needs, "; ".join(needs)))
    return tuple(verdicts)


def _needs(
    ability: Ability,
    packages: Sequence[Wanted],
    faults: Sequence[Finding],
    driver: Driver | NoDriver,
    tools: Mapping[str, str | None],
) -> Iterator[str]:
    missing = [
        extra
        for extra in ability.extras
        if any(extra in package.extras and package.version is None for package in packages)
    ]
    if missing:
        yield f"pip install 'msn-export[{','.join(missing)}]'"
    broken = {fault.package: fault.mend for fault in faults}
    for package in packages:
        if package.name in broken and set(package.extras) & {*ability.extras, ""}:
            yield broken[package.name]
    if ability.gpu and isinstance(driver, NoDriver):
        yield "an NVIDIA GPU with its driver"
    for package in packages:
        lacks_cuda = package.stand_in == "onnxruntime" and package.plugin is None
        if ability.gpu and lacks_cuda and "ort" in ability.extras:
            yield "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    if ability.tool is not None and (line := tools.get(ability.tool)) is not None:
        yield line


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
class GraphSupport:
    """An installed runtime of ONNX files: the graphs that its version takes, and the others.

    A graph is named by its target and dtype; of the others it says the least version, or none.
    ``built_by_trt`` are those of the others that no version takes as they are and ``trt`` builds.
    """

    client: str
    version: str
    takes: tuple[str, ...]
    refuses: dict[str, str | None]
    built_by_trt: tuple[str, ...] = ()


# What a distribution is in the version table
_CLIENTS = {
    "onnxruntime-gpu": Client.ONNXRUNTIME,
    "onnxruntime": Client.ONNXRUNTIME,
    "openvino": Client.OPENVINO,
    "tensorrt": Client.TENSORRT,
    "tensorrt-rtx": Client.TENSORRT_RTX,
}


def graph_support() -> Iterator[GraphSupport]:
    """Compare the installed runtimes with the version table."""
    for name, client in _CLIENTS.items():
        distribution = _installed(name)
        if distribution is None:
            continue
        cells = {
            f"{target} {dtype}": row[client]
            for target, rows in table().items()
            for dtype, row in rows.items()
        }
        version = distribution.version
        takes = tuple(graph for graph, cell in cells.items() if cell.takes(version))
        others = {graph: cell.least for graph, cell in cells.items() if graph not in takes}
        built = tuple(graph for graph, least in others.items() if client.is_compiler and not least)
        yield GraphSupport(client.full_name, version, takes, others, built)


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis(Result):
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
    graphs: tuple[GraphSupport, ...] = ()


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
        commands=decide(commands, packages, faults, driver, tools),
        graphs=tuple(graph_support()),
    )


def _state(
    package: Wanted, probes: Mapping[str, ImportProbe], faults: Iterable[Finding]
) -> PackageState:
    state, detail = "ok", ""
    broken = [fault.what for fault in faults if fault.package == package.name]
    if package.version is None:
        state = "missing"
    elif broken:
        state, detail = "broken", "; ".join(broken)
    elif package.module is not None:
        detail = probes[package.module].fact
    if package.stand_in is not None:
        plugin = f" with {package.plugin}" if package.plugin is not None else ""
        detail = f"{package.stand_in}{plugin} in its place; {detail}"
    return PackageState(package.name, package.range, package.extras, package.version, state, detail)


PRODUCT = "msn-export"
BASE = ""  # the extra that is always there

# Two builds of one module. Installing the one that is asked for beside the other breaks both.
_STANDS_IN = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}
_PLUGINS = ("onnxruntime-ep-cuda13", "onnxruntime-ep-cuda12")  # onnxruntime's CUDA provider


@dataclass(frozen=True, slots=True)
class Wanted:
    """A package that extras ask for; ``module`` is what proves that it works, if it has one.

    ``parts`` are the package's own extras that are asked for. ``stand_in`` is another build of it
    that is installed in its place, and ``plugin`` what gives that build the GPU.
    """

    name: str
    range: str
    extras: tuple[str, ...]
    version: str | None = None
    fits: bool = True
    module: str | None = None
    stand_in: str | None = None
    parts: tuple[str, ...] = ()
    plugin: str | None = None

    @property
    def line(self) -> str:
        """The requirement as pip takes it, of the build that is installed."""
        parts = f"[{','.join(self.parts)}]" if self.parts else ""
        return f"'{self.stand_in or self.name}{parts}{self.range}'"


_DEVELOPERS = {"test", "dev"}  # extras that no command needs


def wanted_packages() -> tuple[Wanted, ...]:
    """List every package that a command may need, in the order of the metadata, as installed."""
    extras: dict[str, list[str]] = {}
    ranges: dict[str, Requirement] = {}
    for extra, requirements in requirements_by_extra().items():
        for requirement in requirements if extra not in _DEVELOPERS else ():
            name = canonicalize_name(requirement.name)
            ranges.setdefault(name, requirement)
            extras.setdefault(name, []).append(extra)
    return tuple(_found(ranges[name], tuple(asking)) for name, asking in extras.items())


def requirements_by_extra() -> Mapping[str, tuple[Requirement, ...]]:
    """Read what this machine needs for each extra; ``BASE`` holds what is always needed.

    An extra that includes another one of ours has that one's packages too.
    """
    try:
        own = importlib.metadata.distribution(PRODUCT)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"{PRODUCT} is not installed, so its extras are unknown; pip install {PRODUCT}"
        ) from error
    listed = [Requirement(text) for text in own.requires or ()]
    names = [BASE, *(own.metadata.get_all("Provides-Extra") or ())]
    return {extra: tuple(_of(extra, listed)) for extra in names}


def _of(extra: str, listed: list[Requirement]) -> Iterator[Requirement]:
    for requirement in listed:
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": BASE})
        if always != (extra == BASE) or not (always or marker.evaluate({"extra": extra})):  # type: ignore[union-attr]
            continue
        if canonicalize_name(requirement.name) == PRODUCT:
            for included in sorted(requirement.extras):
                yield from _of(included, listed)
        else:
            yield requirement


def _found(requirement: Requirement, extras: tuple[str, ...]) -> Wanted:
    name, wanted, parts = (
        requirement.name,
        str(requirement.specifier),
        tuple(sorted(requirement.extras)),
    )
    distribution, stand_in = _installed(name), None
    if distribution is None and name in _STANDS_IN:
        distribution, stand_in = _installed(_STANDS_IN[name]), _STANDS_IN[name]
    if distribution is None:
        return Wanted(name, wanted, extras, parts=parts)
    version = distribution.version
    try:
        fits = requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        fits = False
    module = module_of(distribution)
    plugin = None
    if stand_in == "onnxruntime":
        plugin = next((one for one in _PLUGINS if _installed(one) is not None), None)
    return Wanted(name, wanted, extras, version, fits, module, stand_in, parts, plugin)


def _installed(name: str) -> Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_of(distribution: Distribution, *, depth: int = 3) -> str | None:
    """Name the module whose import proves that a distribution works.

    The one called as the distribution is, else the first; a distribution that only pulls others
    in is proved by theirs of its name (tensorrt-rtx, by tensorrt_rtx_cu13's).
    """
    own = canonicalize_name(distribution.name).replace("-", "_")
    modules = sorted(modules_of(distribution))
    named = [module for module in modules if module.lower() == own]
    if modules:
        return named[0] if named else modules[0]
    for text in (distribution.requires or ()) if depth else ():
        try:
            child = _installed(Requirement(text).name)
        except InvalidRequirement:
            continue
        if child is not None and module_of(child, depth=depth - 1) == own:
            return own
    return None


def modules_of(distribution: Distribution) -> set[str]:
    """List the public modules a distribution installs: packages, files, packages in a namespace."""
    files = [PurePosixPath(file).parts for file in distribution.files or ()]
    packages = {parts[:-1] for parts in files if parts[-1] == "__init__.py"}
    found = {parts[0] for parts in packages if len(parts) == 1}
    found |= {
        ".".join(parts) for parts in packages if len(parts) == 2 and (parts[0],) not in packages
    }
    found |= {
        parts[0].split(".")[0]
        for parts in files
        if len(parts) == 1 and parts[0].endswith((".py", ".so"))
    }
    return {name for name in found if name.replace(".", "_").isidentifier() and name[0] != "_"}
