"""Watches the calls of CUDA and TensorRT, real or stood in for: a ledger, and failures on demand.

Each function that makes something is paired with the one that gives it back. A call can be told to
fail: one that makes or does something is then not carried out, one that gives back is, as CUDA may
report an error of earlier work there.
"""

import gc
import threading
import types
import weakref
from collections import Counter
from typing import Any

PAIRS = {
    "cuCtxPushCurrent": "cuCtxPopCurrent",
    "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost",
    "cuStreamCreate": "cuStreamDestroy",
    "cuEventCreate": "cuEventDestroy",
    "cuStreamEndCapture": "cuGraphDestroy",
    "cuGraphInstantiate": "cuGraphExecDestroy",
}
_ENDS = {release: make for make, release in PAIRS.items()}
_CLASSES = {
    "Runtime": "runtime",
    "deserialize_cuda_engine": "engine",
    "create_execution_context": "context",
    "create_execution_context_without_device_memory": "context",
    "create_runtime_config": "config",
    "create_runtime_cache": "cache",
}
_RAISES = frozenset({"infer_shapes", "set_device_memory"})  # pybind raises where these fail


class Recorder:
    """Counts calls of both modules together.

    ``calls`` are their names in order; ``fail_at`` is the number of the call to fail, from 0.
    ``addresses`` are those that a context was told to read or write. ``retained`` counts how often
    the primary context was retained: it is never released.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.addresses: set[int] = set()
        self.fail_at: int | None = None
        self.problems: list[str] = []
        self.retained = 0
        self._live: Counter[str] = Counter()
        self._lock = threading.RLock()  # the garbage collector may free something inside it
        self._depth = threading.local()
        self._error: Any = None

    def cuda(self, module: Any) -> Any:
        """Wrap ``cuda.bindings.driver``."""
        self._error = module.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        return _Cuda(self, module)

    def tensorrt(self, module: Any) -> Any:
        """Wrap a TensorRT module."""
        wrapped = types.SimpleNamespace(**{name: getattr(module, name) for name in dir(module)})
        wrapped.Runtime = lambda log: self._call("Runtime", module.Runtime, (log,))
        return wrapped

    def count(self, name: str) -> int:
        """Count the calls of one function."""
        return self.calls.count(name)

    def live(self) -> dict[str, int]:
        """List what was made and not given back."""
        if any(self._live.values()):
            gc.collect()
        return {name: number for name, number in self._live.items() if number}

    def _call(self, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Call TensorRT."""
        if self._is_next(name):
            if name in _RAISES:
                raise RuntimeError(f"{name} failed on demand")
            return None if name in _CLASSES else False
        if name == "set_tensor_address":
            self.addresses.add(int(arguments[1]))
        plain = [one.__dict__["_real"] if isinstance(one, _Object) else one for one in arguments]
        made = function(*plain)
        if name not in _CLASSES or made is None:
            return made
        return _Object(self, made, _CLASSES[name])

    def _is_next(self, name: str) -> bool:
        with self._lock:
            number = len(self.calls)
            self.calls.append(name)
        return number == self.fail_at

    def _gone(self, kind: str) -> None:
        with self._lock:
            self._live[kind] -= 1
        if getattr(self._depth, "value", 0) < 1:
            self.problems.append(f"TensorRT's {kind} goes where no GPU is current")


class _Cuda:
    def __init__(self, recorder: Recorder, module: Any) -> None:
        self._recorder, self._module = recorder, module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not name.startswith("cu"):
            return function

        def call(*arguments: Any) -> Any:
            recorder = self._recorder
            fails = recorder._is_next(name)
            ends = _ENDS.get(name)
            if fails and ends is None and name != "cuStreamEndCapture":
                return (recorder._error,)
            result = function(*arguments)
            if fails and name == "cuStreamEndCapture" and int(result[0]) == 0:
                self._module.cuGraphDestroy(result[1])
            elif int(result[0]) == 0:
                self._note(name, ends)
            return (recorder._error,) if fails else result

        call.__name__ = name
        return call

    def _note(self, name: str, ends: str | None) -> None:
        recorder = self._recorder
        with recorder._lock:
            if name in PAIRS:
                recorder._live[name] += 1
            if name == "cuDevicePrimaryCtxRetain":
                recorder.retained += 1
            if ends is not None:
                recorder._live[ends] -= 1
        step = {"cuCtxPushCurrent": 1, "cuCtxPopCurrent": -1}.get(name, 0)
        recorder._depth.value = getattr(recorder._depth, "value", 0) + step


class _Object:
    """A TensorRT object whose method calls are recorded and whose end is noted."""

    def __init__(self, recorder: Recorder, real: Any, kind: str) -> None:
        self.__dict__.update(_recorder=recorder, _real=real)
        with recorder._lock:
            recorder._live[kind] += 1
        weakref.finalize(self, recorder._gone, kind).atexit = False  # not gone then, only not told

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if not callable(value):
            return value
        if name.startswith("get_"):  # reads what the engine says of itself: nothing that fails
            return value
        return lambda *arguments: self._recorder._call(name, value, arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)
