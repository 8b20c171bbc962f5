"""One execution context of an engine, set up and run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msn_export.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from msn_export.runtime.bindings import IExecutionContext
    from msn_export.runtime.cuda import Owned
    from msn_export.spec import TensorSpec


class Execution:
    """An execution context: the profile, shape and addresses it is set to, and a run of it.

    Args:
        context: TensorRT's.
        images: the input.
        name: what errors call it.
        heard: quotes TensorRT's errors.
    """

    def __init__(
        self, context: IExecutionContext, images: TensorSpec, name: str, heard: Callable[[], str]
    ) -> None:
        self._images, self._name, self._heard = images, name, heard
        self._context: IExecutionContext | None = context
        self._profile: int | None = None
        self._batch = 0

    def enqueue(
        self, profile: int, batch: int, addresses: Mapping[str, int], stream: Owned
    ) -> None:
        """Give a run to a stream.

        Args:
            profile: index of the profile.
            batch: images.
            addresses: of every input and output on the GPU.
            stream: all runs of a context go to one stream.

        Raises:
            DeviceError: TensorRT refuses; the message has what it says.
        """
        why = ""
        try:
            refused = self._enqueue(profile, batch, addresses, int(stream))
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            refused, why = "the run", " ".join(str(error).split())
        if refused:  # raised here, not inside: a traceback would keep the context alive
            raise DeviceError(f"{self._name} refuses {refused}: {why or self._heard()}")

    def _enqueue(self, profile: int, batch: int, addresses: Mapping[str, int], stream: int) -> str:
        """Give the run; what TensorRT refuses, or nothing."""
        context: IExecutionContext = self._context
        if profile != self._profile:
            self._profile, self._batch = None, 0
            if not context.set_optimization_profile_async(profile, stream):
                return f"profile {profile}"
            self._profile = profile
        if batch != self._batch:
            self._batch = 0
            shape = (batch, *self._images.shape[1:])
            if not context.set_input_shape(self._images.name, shape) or context.infer_shapes():
                return f"images of {list(shape)}"
            self._batch = batch
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                return f"the address of {name!r}"
        return "" if context.execute_async_v3(stream) else "the run"

    def close(self) -> None:
        """Free the context; its stream must have done what it was given."""
        self._context = None
