"""What is to be compiled, and which options can be had with which backend on which GPU."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from msn_export.engine.versions import Backend, require_buildable
from msn_export.engine_header import CAPABILITIES, may_target
from msn_export.errors import BuildError, SpecError
from msn_export.host import Device, Driver, NoDriver
from msn_export.schema import Count, Job, Within
from msn_export.spec import AMPERE, BatchRange, ComputeCapability, Dtype


@dataclass(frozen=True, slots=True)
class BuildSpec(Job):
    """What to compile, for which GPUs and within which limits.

    ``profiles`` are the batch ranges to tune for, in order. No ``capabilities``: TensorRT-RTX
    then claims every GPU from Ampere on. ``precision`` matters only where the network is not
    strongly typed. ``workspace`` (a kernel's scratch memory) and ``memory_limit`` (of the compiler
    process, resident) are in bytes, ``timeout`` is in seconds. ``allow_unfused`` lets
    TensorRT take an Attention operator apart where it has no fused kernel for it; without it such
    a graph does not compile, so that a build proves the fusion. ``tf32`` lets fp32 products round
    their inputs to 10 bits of mantissa, which TensorRT does by default and this package does not.
    ``hardware_compatible`` is for every GPU from Ampere on, not only for the builder's own.
    """

    model: Path
    profiles: tuple[BatchRange, ...]
    capabilities: tuple[ComputeCapability, ...] = ()
    precision: Dtype | None = None
    workspace: Count | None = None
    optimization_level: Annotated[int, Within(0, 5)] | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False
    allow_unfused: bool = False
    timeout: Annotated[float, Within(0, above=True)] | None = None
    memory_limit: Count | None = None

    def require_consistent(self) -> None:
        """Refuse to build for nothing, and for one thing twice."""
        if not self.profiles:
            raise SpecError("no batch range; give at least one --batch")
        for option, items in (("batch", self.profiles), ("compute-capability", self.capabilities)):
            texts = [str(item) for item in items]
            for text in texts:
                if texts.count(text) > 1:
                    raise SpecError(f"--{option} {text} is given twice")

    def options_set(self) -> dict[str, Any]:
        """List the options that differ from their default."""
        required = {"model", "profiles"}
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in required and getattr(self, field.name) != field.default
        }


@dataclass(frozen=True, slots=True)
class BuildStep:
    """How far a build is: ``step`` of ``steps`` of a named phase, ``fraction`` of it all (0 to 1).

    Phases nest; ``fraction`` never goes back.
    """

    phase: str
    step: int
    steps: int
    fraction: float


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Turn a builder's nested phases into one fraction.

    A phase that runs inside another fills the parent's next step.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> BuildStep:
        """Open a phase of ``steps`` steps inside ``parent`` (None: it is the outermost)."""
        self._open[name] = _Phase(parent, max(steps, 1))
        return self._progress(name)

    def step(self, name: str, step: int) -> BuildStep | None:
        """Note that step ``step``, counted from 0, is complete; None if no such phase is open."""
        phase = self._open.get(name)
        if phase is None:
            return None
        phase.done = min(step + 1, phase.steps)
        return self._progress(name)

    def finish(self, name: str) -> None:
        """Close a phase."""
        self._open.pop(name, None)

    def _progress(self, name: str) -> BuildStep:
        phase = self._open[name]
        root = next((key for key, item in self._open.items() if item.parent is None), None)
        if root is not None:
            self._fraction = max(self._fraction, self._share(root))
        return BuildStep(name, phase.done, phase.steps, self._fraction)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inside = next((key for key, item in self._open.items() if item.parent == name), None)
        part = self._share(inside) if inside is not None and inside != name else 0.0
        return min((phase.done + part) / phase.steps, 1.0)


# The first GPU generation that computes in a dtype; TensorRT-RTX refuses a named older one, and
# where none is named writes an engine that claims GPUs which cannot run it: those from Ampere on.
_FIRST_CAPABILITY = {
    "BF16": ComputeCapability(8, 0),
    "FP8": ComputeCapability(8, 9),
    "FP4": ComputeCapability(12, 0),
}


def check_options(spec: BuildSpec, backend: Backend, driver: Driver | NoDriver) -> tuple[str, ...]:
    """Refuse what cannot be built here, and tell of the options that do nothing.

    It needs no graph, so that a command can ask before it begins its work.

    Raises:
        BuildError: the backend needs a GPU and there is none, it cannot have an option, or it has
            no kernels for a target.
    """
    require_buildable(backend, driver)
    row, options = backend.row, spec.options_set()
    for option in options.keys() & row.refused.keys():
        raise BuildError(f"{backend} cannot take {_flag(option)}: {row.refused[option]}")
    for capability in spec.capabilities:
        if not may_target(capability):
            raise no_kernels(capability, CAPABILITIES)
    if spec.hardware_compatible and isinstance(driver, Driver):
        _require_ampere(driver.devices[0])
    notes = [
        f"{_flag(option)} has no effect: {row.ignored[option]}"
        for option in options
        if option in row.ignored
    ]
    if len(spec.capabilities) > 1:
        # measured: an engine for 8.9 and 12.0 has the kernels of the one for 8.9 alone
        notes.append(
            f"one set of kernels serves all targets, that of {min(spec.capabilities)}; an engine "
            "for each target may be faster"
        )
    return tuple(notes)


def _require_ampere(device: Device) -> None:
    # NvInfer.h, HardwareCompatibilityLevel: from Ampere on, and built on Ampere or later
    if device.capability < AMPERE:
        raise BuildError(
            f"--hardware-compatible needs a GPU of SM {AMPERE} or later to build on, and "
            f"{device.name} is SM {device.capability}; leave it out, or build where such a GPU is"
        )


def require_capable(dtypes: Set[str], capabilities: tuple[ComputeCapability, ...]) -> None:
    """Refuse targets that do not compute in all of ``dtypes``, in TensorRT's spelling.

    Raises:
        BuildError: one does not, or none is named and not every one of TensorRT-RTX's does.
    """
    for dtype, first in _FIRST_CAPABILITY.items():
        if dtype not in dtypes:
            continue
        if not capabilities and first > AMPERE:
            raise BuildError(
                f"the graph computes in {dtype.lower()}, which GPUs before {first} cannot; name "
                f"the target: --compute-capability {first}"
            )
        for capability in capabilities:
            if capability < first:
                raise BuildError(
                    f"the graph computes in {dtype.lower()}, which --compute-capability "
                    f"{capability} cannot; it takes {first} or later"
                )


def no_kernels(capability: ComputeCapability, known: Iterable[ComputeCapability]) -> BuildError:
    """Say that TensorRT-RTX does not compile for a GPU generation, and for which it does."""
    return BuildError(
        f"TensorRT-RTX cannot compile for compute capability {capability}; it can for "
        f"{', '.join(map(str, known))}"
    )


def _flag(option: str) -> str:
    """Spell an option as the command line does."""
    return {"capabilities": "--compute-capability"}.get(option, f"--{option.replace('_', '-')}")
