"""The array library a tensor came from: how it takes one back, and which stream it works on."""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# How a library is asked for the stream that a thread works on, given the GPU's index. For others
# the caller names the stream, or the call waits until its work is done.
CURRENT_STREAM: dict[str, Callable[[Any, int], int]] = {
    "torch": lambda torch, device: torch.cuda.current_stream(device).cuda_stream,
    "cupy": lambda cupy, device: cupy.cuda.get_current_stream(device).ptr,
}
# How a library is told to finish what it computes, where its reader cannot wait in a stream.
FINISH: dict[str, Callable[[Any, Any, int], object]] = {
    "torch": lambda torch, _, device: torch.cuda.current_stream(device).synchronize(),
    "cupy": lambda cupy, _, device: cupy.cuda.get_current_stream(device).synchronize(),
    "jaxlib": lambda _, tensor, __: tensor.block_until_ready(),
}


def take_back(tensor: Any) -> Callable[[Any], Any]:
    """Find what turns a DLPack tensor into one of the library of ``tensor``.

    Nothing is imported: the library that made ``tensor`` is loaded. One that takes no DLPack
    gets what the runner has.
    """
    namespace = getattr(tensor, "__array_namespace__", None)
    if namespace is not None:  # the array API: cupy, jax
        found: Callable[[Any], Any] = namespace().from_dlpack
        return found
    module = _module_of(tensor)
    return module.from_dlpack if module is not None else lambda made: made


def current_stream(tensor: Any, device: int) -> int | None:
    """Ask the library of a GPU tensor for its current stream; None where that is not known."""
    root = _root_in(CURRENT_STREAM, tensor)
    return None if root is None else int(CURRENT_STREAM[root](sys.modules[root], device))


def finish(tensor: Any, device: int, stream: Any = None) -> None:
    """Wait, in this thread, until the library of a GPU tensor has computed it.

    Args:
        tensor: the tensor.
        device: the GPU's index.
        stream: on which it is made, where that is not the library's current one.
    """
    if callable(wait := getattr(stream, "synchronize", None)):
        wait()
    root = _root_in(FINISH, tensor)
    if root is not None:
        FINISH[root](sys.modules[root], tensor, device)


def handle_of(stream: Any) -> int:
    """Take a stream as a number or an object: CUDA's protocol, torch, cupy, cuda-bindings."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(handle)
    return int(stream)


def _root_in(table: Mapping[str, object], tensor: Any) -> str | None:
    """Find the package, of the tensor's type or a base of it, that has a row in a table."""
    roots = (kind.__module__.partition(".")[0] for kind in type(tensor).__mro__)
    return next((root for root in roots if root in table and root in sys.modules), None)


def _module_of(tensor: Any) -> ModuleType | None:
    """Find the top-level package, of the tensor's type or a base of it, that takes DLPack."""
    for kind in type(tensor).__mro__:
        module = sys.modules.get(kind.__module__.partition(".")[0])
        if callable(getattr(module, "from_dlpack", None)):
            return module
    return None
