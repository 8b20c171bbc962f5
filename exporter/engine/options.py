"""Which options of a build can be had, with which backend and on which GPU."""

from collections.abc import Iterable, Set

from msn_export.driver import Device, Driver, NoDriver
from msn_export.engine.backend import Backend, require_buildable
from msn_export.engine.job import BuildSpec
from msn_export.engine_header import CAPABILITIES, may_target
from msn_export.errors import BuildError
from msn_export.spec import AMPERE, ComputeCapability

# The first GPU generation that computes in a dtype; TensorRT-RTX refuses a named older one, and
# where none is named writes an engine that claims GPUs which cannot run it: those from Ampere on.
_FIRST_CAPABILITY = {
    "BF16": ComputeCapability(8, 0),
    "FP8": ComputeCapability(8, 9),
    "FP4": ComputeCapability(12, 0),
}


def judge(spec: BuildSpec, backend: Backend, driver: Driver | NoDriver) -> tuple[str, ...]:
    """Refuse what cannot be built here, and tell of the options that do nothing.

    It needs no graph, so that a command can ask before it begins its work.

    Raises:
        BuildError: the backend needs a GPU and there is none, it cannot have an option, or it has
            no kernels for a target.
    """
    require_buildable(backend, driver)
    flavour, options = backend.flavour, spec.options_set()
    for option in options.keys() & flavour.refused.keys():
        raise BuildError(f"{backend} cannot take {_flag(option)}: {flavour.refused[option]}")
    for capability in spec.capabilities:
        if not may_target(capability):
            raise no_kernels(capability, CAPABILITIES)
    if spec.hardware_compatible and isinstance(driver, Driver):
        _require_ampere(driver.devices[0])
    notes = [
        f"{_flag(option)} has no effect: {flavour.ignored[option]}"
        for option in options
        if option in flavour.ignored
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
