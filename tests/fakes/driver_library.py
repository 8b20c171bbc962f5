"""A ``libcuda.so.1`` whose functions are those of ``cuda_stand_in``: for the real cuda-bindings.

The bindings look functions up with ``cuGetProcAddress_v2``, which this library answers with Python
functions. So what a test runs goes through the bindings' own code: how many arguments a function
takes, which of them may be plain numbers, what comes back and as what. The library must be found
before the bindings look for it: ``environment`` is for the process that does.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.cuda_stand_in import CudaStandIn, CUstreamCaptureMode

SOURCE = """
#include <string.h>
static struct { char name[64]; void *function; } table[64];
static int count;
void answer(const char *name, void *function) {
    for (int i = 0; i < count; i++)
        if (!strcmp(table[i].name, name)) { table[i].function = function; return; }
    strncpy(table[count].name, name, 63);
    table[count++].function = function;
}
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags,
                        int *status) {
    *function = 0;
    for (int i = 0; i < count; i++)
        if (!strcmp(table[i].name, name)) *function = table[i].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
"""
_WORD, _INT, _SIZE, _OUT = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_FLAGS, _LONG = ctypes.c_uint, ctypes.c_ulonglong
# cuda.h's parameters: first those that a result is written to, then those that are given
FUNCTIONS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cuInit": ((), (_FLAGS,)),
    "cuDeviceGet": ((_INT,), (_INT,)),
    "cuDevicePrimaryCtxRetain": ((_WORD,), (_INT,)),
    "cuCtxPushCurrent": ((), (_WORD,)),
    "cuCtxPopCurrent": ((_WORD,), ()),
    "cuMemAlloc": ((_WORD,), (_SIZE,)),
    "cuMemFree": ((), (_WORD,)),
    "cuMemHostAlloc": ((_WORD,), (_SIZE, _FLAGS)),
    "cuMemFreeHost": ((), (_WORD,)),
    "cuMemGetInfo": ((_SIZE, _SIZE), ()),
    "cuStreamCreate": ((_WORD,), (_FLAGS,)),
    "cuStreamDestroy": ((), (_WORD,)),
    "cuStreamSynchronize": ((), (_WORD,)),
    "cuEventCreate": ((_WORD,), (_FLAGS,)),
    "cuEventDestroy": ((), (_WORD,)),
    "cuEventRecord": ((), (_WORD, _WORD)),
    "cuStreamWaitEvent": ((), (_WORD, _WORD, _FLAGS)),
    "cuMemcpyHtoDAsync": ((), (_WORD, _WORD, _SIZE, _WORD)),
    "cuMemcpyDtoHAsync": ((), (_WORD, _WORD, _SIZE, _WORD)),
    "cuMemcpyDtoDAsync": ((), (_WORD, _WORD, _SIZE, _WORD)),
    "cuStreamBeginCapture": ((), (_WORD, _INT)),
    "cuStreamIsCapturing": ((), (_WORD, _OUT)),
    "cuStreamEndCapture": ((), (_WORD, _OUT)),
    "cuGraphInstantiateWithFlags": ((_WORD,), (_WORD, _LONG)),
    "cuGraphDestroy": ((), (_WORD,)),
    "cuGraphExecDestroy": ((), (_WORD,)),
    "cuGraphLaunch": ((), (_WORD, _WORD)),
}

BEHIND = {"cuStreamIsCapturing": _INT, "cuStreamEndCapture": _WORD}  # whose result comes last


def make(folder: Path) -> Path:
    """Compile the library into a folder."""
    path = folder / "libcuda.so.1"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-xc", "-", "-o", path],
        input=SOURCE.encode(), check=True, capture_output=True,
    )  # fmt: skip
    return path


def environment(folder: Path) -> dict[str, str]:
    """Give the variables of a process that finds the library of a folder."""
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


class DriverLibrary:
    """The library, in this process; ``device`` is the stand-in that answers."""

    def __init__(self) -> None:
        self.device = CudaStandIn()
        self.called: set[str] = set()
        library = ctypes.CDLL("libcuda.so.1")
        self._kept = [self._callback(name) for name in FUNCTIONS]
        for name, function in zip(FUNCTIONS, self._kept, strict=True):
            library.answer(name.encode(), ctypes.cast(function, ctypes.c_void_p))

    def _callback(self, name: str) -> Any:
        written, given = FUNCTIONS[name]
        kind = ctypes.CFUNCTYPE(_INT, *(_OUT for _ in written), *given)

        def function(*arguments: Any) -> int:
            self.called.add(name)
            results, rest = arguments[: len(written)], list(arguments[len(written) :])
            if name == "cuStreamBeginCapture":
                rest[1] = CUstreamCaptureMode(rest[1])
            if name in BEHIND:
                results = (rest.pop(),)
            plain = name.removesuffix("WithFlags")  # what the bindings call behind the plain name
            call: Callable[..., tuple[Any, ...]] = getattr(self.device, plain)
            code, *values = call(*(value or 0 for value in rest))
            targets = written or (BEHIND.get(name),)
            for target, value, word in zip(results, values, targets, strict=False):
                word.from_address(target).value = int(value or 0)
            return int(code)

        return kind(function)
