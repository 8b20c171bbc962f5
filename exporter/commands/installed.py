"""The packages of each extra, what is installed of them, and whether a module can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from msn_export.errors import MissingPackageError
from msn_export.host import signal_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from importlib.metadata import Distribution


PRODUCT = "msn-export"
BASE = ""  # the extra that is always there

# Two builds of one module. Installing the one that is asked for beside the other breaks both.
_STANDS_IN = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A package that extras ask for; ``module`` is what proves that it works, if it has one.

    ``parts`` are the package's own extras that are asked for. ``stand_in`` is another build of it
    that is installed in its place.
    """

    name: str
    range: str
    extras: tuple[str, ...]
    version: str | None = None
    fits: bool = True
    module: str | None = None
    stand_in: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The requirement as pip takes it."""
        parts = f"[{','.join(self.parts)}]" if self.parts else ""
        return f"'{self.name}{parts}{self.range}'"


def wanted_packages() -> tuple[Wanted, ...]:
    """List every package of every extra, in the order of the metadata, with what is installed."""
    extras: dict[str, list[str]] = {}
    ranges: dict[str, Requirement] = {}
    for extra, requirements in requirements_by_extra().items():
        for requirement in requirements:
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
    return Wanted(name, wanted, extras, version, fits, module, stand_in, parts)


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


_TIMEOUT = 180.0  # seconds; torch from a cold network disk takes one minute

# What else of a module must load for it to be of use
_DEEPER = {
    "cuda.bindings": ("cuda.bindings.driver", "cuda.bindings.runtime"),
    "tritonclient": ("tritonclient.grpc",),
}

# What a module says of itself, as an expression of ``m``
_FACTS = {
    "torch": "f'CUDA {m.version.cuda}' if m.version.cuda else 'CPU build'",
    "onnxruntime": "', '.join(m.get_available_providers())",
}

_SCRIPT = """
import importlib, json, sys
for name in sys.argv[3:]:
    importlib.import_module(name)
m = importlib.import_module(sys.argv[1])
print("\\n" + json.dumps(eval(sys.argv[2])))
"""


@dataclass(frozen=True, slots=True)
class ImportProbe:
    """The import of a module: ``fault`` is why it fails, ``fact`` what it says of itself."""

    module: str
    fault: str | None
    fact: str


def probe_all(modules: Iterable[str], workers: int) -> Mapping[str, ImportProbe]:
    """Import every module, each in a process of its own, several at a time."""
    names = sorted(set(modules))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return dict(zip(names, pool.map(probe, names), strict=True))


def probe(module: str) -> ImportProbe:
    """Import one module. A crash is a fault with its signal, a hang one with its time."""
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-c",
        _SCRIPT,
        module,
        _FACTS.get(module, "''"),
        *_DEEPER.get(module, ()),
    ]
    try:
        # this interpreter, and module names out of installed packages' metadata
        run = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return ImportProbe(module, f"importing it takes more than {_TIMEOUT:.0f} s", "")
    if run.returncode == 0:
        return ImportProbe(module, None, str(json.loads(run.stdout.splitlines()[-1])))
    return ImportProbe(module, _fault(run.returncode, run.stderr), "")


def _fault(code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it says nothing"
    if code < 0:
        return f"importing it ends the process ({signal_name(code)}); {last}"
    return last
