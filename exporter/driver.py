"""Look for an NVIDIA driver without touching TensorRT.

Constructing ``trt.Runtime`` (or, in full TensorRT, ``trt.Builder``) where no driver is found ends
the process, so every path that would do so asks here first. The driver API works with any driver
version; the CUDA runtime library is not needed.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

from msn_export.spec import ComputeCapability

# CUDA driver API, cuda.h: CUdevice_attribute
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
_NO_DEVICE = 100  # CUresult CUDA_ERROR_NO_DEVICE: cuInit says so where all devices are hidden
_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU; ``memory`` in bytes."""

    index: int
    name: str
    capability: ComputeCapability
    memory: int


@dataclass(frozen=True, slots=True)
class Driver:
    """A working driver; ``cuda`` is the newest CUDA it knows, such as ``13.0``."""

    cuda: str
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class NoDriver:
    """Why no GPU can be used here, as the end of a sentence."""

    reason: str


class _CallError(Exception):
    """A driver call gave an error code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def find_driver(library: str = _LIBRARY) -> Driver | NoDriver:
    """Find the driver and its devices; a driver that sees no device counts as none."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return NoDriver(f"no NVIDIA driver ({library} cannot be loaded)")
    try:
        _call(cuda, "cuInit", 0)
        devices = tuple(_device(cuda, index) for index in range(_number(cuda, "cuDeviceGetCount")))
        version = _number(cuda, "cuDriverGetVersion")
    except _CallError as error:
        if error.code == _NO_DEVICE:
            return _no_device()
        return NoDriver(f"the NVIDIA driver does not work ({error})")
    except AttributeError as error:  # a library without the driver's functions
        return NoDriver(f"the NVIDIA driver does not work ({error})")
    if not devices:
        return _no_device()
    return Driver(f"{version // 1000}.{version % 1000 // 10}", devices)


def _no_device() -> NoDriver:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
    return NoDriver(f"the NVIDIA driver sees no GPU{hint}")


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle = _number(cuda, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), handle)
    memory = ctypes.c_size_t()
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    major, minor = (
        _number(cuda, "cuDeviceGetAttribute", attribute, handle) for attribute in (_MAJOR, _MINOR)
    )
    text = name.value.decode("utf-8", "replace")
    return Device(index, text, ComputeCapability(major, minor), memory.value)


def _number(cuda: ctypes.CDLL, function: str, *arguments: int) -> int:
    """Call a function whose first parameter receives an int."""
    value = ctypes.c_int()
    _call(cuda, function, ctypes.byref(value), *arguments)
    return value.value


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    call: Callable[..., int] = getattr(cuda, function)
    code = call(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        name = text.value.decode() if text.value else "unknown"
        raise _CallError(f"{function}: {name}, error {code}", code)
