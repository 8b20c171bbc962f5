"""What is to be compiled, and how far it is: the values that go to and from the compiler."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from msn_export.errors import SpecError
from msn_export.spec import BatchRange, ComputeCapability, Dtype


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What to compile, for which GPUs and within which limits.

    ``profiles`` are the batch ranges to tune for, in order. No ``capabilities``: TensorRT-RTX
    then claims every GPU from Ampere on. ``precision`` matters only where the network is not
    strongly typed. ``workspace`` (a kernel's scratch memory) and ``memory_limit`` (of the compiler
    process, resident) are in bytes, ``timeout`` is in seconds. ``decompose_attention`` lets
    TensorRT take an Attention operator apart where it has no fused kernel for it; without it such
    a graph does not compile, so that a build proves the fusion. ``tf32`` lets fp32 products round
    their inputs to 10 bits of mantissa, which TensorRT does by default and this package does not.
    ``hardware_compatible`` is for every GPU from Ampere on, not only for the builder's own.
    """

    model: Path
    profiles: tuple[BatchRange, ...]
    capabilities: tuple[ComputeCapability, ...] = ()
    precision: Dtype | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False
    decompose_attention: bool = False
    timeout: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.profiles:
            raise SpecError("no batch range; give at least one --batch")
        for option, items in (("batch", self.profiles), ("compute-capability", self.capabilities)):
            texts = [str(item) for item in items]
            for text in texts:
                if texts.count(text) > 1:
                    raise SpecError(f"--{option} {text} is given twice")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise SpecError(f"optimization level {self.optimization_level} is not one of 0 to 5")
        for option, value in (
            ("workspace", self.workspace),
            ("memory limit", self.memory_limit),
            ("timeout", self.timeout),
        ):
            if value is not None and not value > 0:
                raise SpecError(f"{option} {value} must be above zero")

    def options_set(self) -> dict[str, Any]:
        """List the options that differ from their default."""
        required = {"model", "profiles"}
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in required and getattr(self, field.name) != field.default
        }

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values; ``from_json`` reads them back."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["model"] = str(self.model)
        plain["timing_cache"] = self.timing_cache and str(self.timing_cache)
        plain["profiles"] = [str(profile) for profile in self.profiles]
        plain["capabilities"] = [str(capability) for capability in self.capabilities]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` gave."""
        values = dict(plain)
        values["model"] = Path(plain["model"])
        values["timing_cache"] = plain["timing_cache"] and Path(plain["timing_cache"])
        values["profiles"] = tuple(BatchRange.parse(text) for text in plain["profiles"])
        values["capabilities"] = tuple(
            ComputeCapability.parse(text) for text in plain["capabilities"]
        )
        values["precision"] = plain["precision"] and Dtype(plain["precision"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Progress:
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

    def start(self, name: str, parent: str | None, steps: int) -> Progress:
        """Open a phase of ``steps`` steps inside ``parent`` (None: it is the outermost)."""
        self._open[name] = _Phase(parent, max(steps, 1))
        return self._progress(name)

    def step(self, name: str, step: int) -> Progress | None:
        """Note that step ``step``, counted from 0, is complete; None if no such phase is open."""
        phase = self._open.get(name)
        if phase is None:
            return None
        phase.done = min(step + 1, phase.steps)
        return self._progress(name)

    def finish(self, name: str) -> None:
        """Close a phase."""
        self._open.pop(name, None)

    def _progress(self, name: str) -> Progress:
        phase = self._open[name]
        root = next((key for key, item in self._open.items() if item.parent is None), None)
        if root is not None:
            self._fraction = max(self._fraction, self._share(root))
        return Progress(name, phase.done, phase.steps, self._fraction)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inside = next((key for key, item in self._open.items() if item.parent == name), None)
        part = self._share(inside) if inside is not None and inside != name else 0.0
        return min((phase.done + part) / phase.steps, 1.0)
