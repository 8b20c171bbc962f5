"""A model that is open somewhere: here, or on the machines of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from msn_export.manifest import Manifest
    from msn_export.runtime import Runner
    from msn_export.spec import BatchRange, TensorSpec


class Opened(Protocol):
    """What is known of an open model; a ``Runner`` is one."""

    @property
    def name(self) -> str:
        """What runs it, and on what."""

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the artifact; None where there is no manifest."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it gives."""

    @property
    def batch(self) -> BatchRange:
        """The batches it accepts."""


def tested(runner: Runner, *, check: bool) -> str:
    """Run the manifest's golden input, before a night is spent on a model that is wrong here.

    Raises:
        ToleranceError: this machine does not reproduce it.
    """
    if not check:
        return "none (--no-check)"
    if runner.manifest is None or runner.manifest.golden is None:
        return "none: no golden input came with the model"
    found = runner.selftest()
    if not found.passed:
        raise ToleranceError(
            f"{found}: this machine does not compute what the model was checked for; export it "
            "here, or run it all the same with --no-check"
        )
    return str(found)
