"""One row a dtype: what ONNX, NumPy, DLPack and TensorRT call it.

The structures are those of dlpack.h, DLPack 1.1 (github.com/dmlc/dlpack). NumPy makes the capsules
that are lent, around memory it never touches, and this module writes the true device and dtype into
them: so what frees a capsule is NumPy's C code. A destructor written in Python would lose the
exception that is being raised when it is called.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError, MsnExportError


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype of an input or output.

    ``onnx`` is the name manifests use (ONNX's, in lower case) and ``number`` its number in
    onnx.TensorProto.DataType; ``code`` and ``bits`` are DLPack's; ``numpy`` is None for bfloat16,
    which NumPy cannot name: its bytes travel as uint16.
    """

    onnx: str
    number: int
    code: int
    bits: int
    numpy: str | None
    tensorrt: str | None

    def __str__(self) -> str:
        return self.numpy or self.onnx

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The NumPy dtype whose arrays hold the bytes."""
        return np.dtype(self.numpy or "uint16")


ELEMENTS = (
    TensorType("float", 1, 2, 32, "float32", "FLOAT"),
    TensorType("float16", 10, 2, 16, "float16", "HALF"),
    TensorType("bfloat16", 16, 4, 16, None, "BF16"),
    TensorType("double", 11, 2, 64, "float64", None),
    TensorType("uint8", 2, 1, 8, "uint8", "UINT8"),
    TensorType("int8", 3, 0, 8, "int8", "INT8"),
    TensorType("int32", 6, 0, 32, "int32", "INT32"),
    TensorType("int64", 7, 0, 64, "int64", "INT64"),
    TensorType("bool", 9, 6, 8, "bool", "BOOL"),
)
OF_ONNX = {element.onnx: element for element in ELEMENTS}
OF_NUMPY = {element.storage: element for element in ELEMENTS if element.numpy}
OF_DLPACK = {(element.code, element.bits): element for element in ELEMENTS}
OF_TENSORRT = {element.tensorrt: element for element in ELEMENTS if element.tensorrt}


def widen(bfloat16: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Give bfloat16 values, as their bytes, as float32: exact, it has the same exponent."""
    return (bfloat16.astype(np.uint32) << np.uint32(16)).view(np.float32)


CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
_HOST = frozenset({CPU, CUDA_HOST})
_ON_GPU = frozenset({CUDA, CUDA_MANAGED})
_NAMES = (b"dltensor_versioned", b"dltensor")


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_get_pointer.restype = ctypes.c_void_p


class _Memory:
    """Memory at an address, as NumPy accepts it; ``owner`` lives as long as an array over it."""

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        element: TensorType,
        owner: object,
    ) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (pointer, False),
            "shape": shape,
            "strides": strides,
            "typestr": element.storage.str,
        }


def array_at(
    pointer: int,
    shape: tuple[int, ...],
    element: TensorType,
    owner: object = None,
    strides: tuple[int, ...] | None = None,
) -> NDArray[Any]:
    """Make an array over memory that ``owner`` keeps alive; ``strides`` in bytes."""
    return np.asarray(_Memory(pointer, shape, strides, element, owner))


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A tensor of another library, readable in place for as long as this object lives.

    ``strides`` are in elements; ``device`` is the GPU's index, None on the host.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    element: TensorType
    device: int | None
    capsule: object

    @property
    def is_contiguous(self) -> bool:
        if self.strides is None:
            return True
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def array(self) -> NDArray[Any]:
        """Give a host tensor's values without a copy; bfloat16 as its bytes, uint16."""
        size = self.element.bytes
        strides = None if self.strides is None else tuple(size * step for step in self.strides)
        return array_at(self.pointer, self.shape, self.element, self.capsule, strides)


def has(given: Any, name: str) -> bool:
    """True where an object has an attribute; one that raises when it is asked has it not."""
    try:
        return hasattr(given, name)
    except Exception:  # noqa: BLE001  anything may be given as images
        return False


def device_of(tensor: Any) -> int | None:
    """Index of the GPU a DLPack tensor lies on; None for the host."""
    if not has(tensor, "__dlpack__") or not has(tensor, "__dlpack_device__"):
        raise InputError(
            f"images are a {type(tensor).__name__}; expected a numpy array or a tensor with "
            "DLPack (torch, cupy, jax)"
        )
    try:
        kind, index = (int(value) for value in tensor.__dlpack_device__())
    except Exception as error:  # a device that DLPack has no number for, as torch's meta
        raise _unreadable(tensor, error) from error
    if kind in _HOST:
        return None
    if kind in _ON_GPU:
        return index
    raise InputError(
        f"images lie on a device of DLPack's kind {kind}; expected the host or an NVIDIA GPU"
    )


def borrow(tensor: Any, stream: int | None = None) -> Borrowed:
    """Read a DLPack tensor in place.

    A torch tensor that is stored negated or conjugated is read from a copy that is not: DLPack
    has no field for either, and torch lends the stored values without the sign.

    ``stream`` will read a tensor on a GPU: its library makes that stream wait for what it still
    computes. 0 is the legacy default stream.
    """
    device = device_of(tensor)
    # the array API names the legacy default stream 1: 0 would be ambiguous
    wait: dict[str, Any] = {} if device is None or stream is None else {"stream": stream or 1}
    try:
        for resolve in ("resolve_conj", "resolve_neg"):
            tensor = getattr(tensor, resolve, lambda tensor=tensor: tensor)()
        try:
            capsule = tensor.__dlpack__(**wait, max_version=(1, 1))
        except TypeError:  # a library from before DLPack 1.0
            capsule = tensor.__dlpack__(**wait)
    except MsnExportError:  # it is an output of a runner, and the GPU failed
        raise
    except Exception as error:
        raise _unreadable(tensor, error) from error
    view = _tensor_of(capsule)
    element = OF_DLPACK.get((view.code, view.bits))
    if element is None or view.lanes != 1:
        raise InputError(
            f"images are of DLPack's dtype {view.code}, {view.bits} bits, {view.lanes} lanes; "
            "expected a plain float, integer or bool"
        )
    dimensions = range(view.ndim)
    shape = tuple(view.shape[i] for i in dimensions)
    if not view.data and math.prod(shape):  # torch's ZeroTensor has a shape and no memory
        raise InputError(f"the images' {type(tensor).__name__} of {list(shape)} has no memory")
    return Borrowed(
        pointer=(view.data or 0) + view.byte_offset,
        shape=shape,
        strides=tuple(view.strides[i] for i in dimensions) if view.strides else None,
        element=element,
        device=device,
        capsule=capsule,
    )


def _unreadable(tensor: Any, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"the images' {type(tensor).__name__} cannot be read in place: {reason}")


def lend(
    array: NDArray[Any], element: TensorType, device: tuple[int, int], *, versioned: bool
) -> object:
    """Make a capsule over an array; whoever takes it owns it.

    ``array`` was made by ``array_at``, so that its owner lives until the capsule's taker is done.
    ``element`` is the dtype to name, where NumPy cannot; ``device`` DLPack's device type and
    index. ``versioned``: the taker knows DLPack 1.
    """
    version = {"max_version": (1, 0)} if versioned else {}
    try:
        capsule: object = array.__dlpack__(**version)  # type: ignore[arg-type]
    except TypeError:  # NumPy 1.26 and 2.0 know the older form only, which every taker knows
        capsule = array.__dlpack__()
    view = _tensor_of(capsule)
    view.code = element.code
    view.device_type, view.device_index = device
    return capsule


def _tensor_of(capsule: object) -> _Tensor:
    for name, kind in zip(_NAMES, (_ManagedVersioned, _Managed), strict=True):
        if _is_valid(capsule, name):
            managed = kind.from_address(_get_pointer(capsule, name))
            if getattr(managed, "major", 1) != 1:
                raise InputError(f"images use DLPack {managed.major}; expected 0 or 1")
            found: _Tensor = managed.tensor
            return found
    raise InputError("the images' library gave no DLPack capsule that can be read")


# Calls that give the stream a library's thread works on, given the GPU's index. For others
# the caller names the stream, or the call waits until its work is done.
CURRENT_STREAM: dict[str, Callable[[Any, int], Any]] = {
    "torch": lambda torch, device: torch.cuda.current_stream(device),
    "cupy": lambda cupy, device: cupy.cuda.get_current_stream(device),
}
# Calls that wait for what a library computes, where its reader cannot wait in a stream.
FINISH: dict[str, Callable[[Any, Any, int], object]] = {
    "torch": lambda torch, _, device: torch.cuda.current_stream(device).synchronize(),
    "cupy": lambda cupy, _, device: cupy.cuda.get_current_stream(device).synchronize(),
    "jaxlib": lambda _, tensor, __: tensor.block_until_ready(),
}


def take_back(tensor: Any) -> Callable[[Any], Any]:
    """Find the function that turns a DLPack tensor into one of the library of ``tensor``.

    Nothing is imported: the library that made ``tensor`` is loaded. One that takes no DLPack
    gets what the runner has.
    """
    namespace = getattr(tensor, "__array_namespace__", None)
    if namespace is not None:  # the array API: cupy, jax
        found: Callable[[Any], Any] = namespace().from_dlpack
        return found
    module = _module_of(tensor)
    return module.from_dlpack if module is not None else lambda output: output


def current_stream(tensor: Any, device: int) -> Any:
    """Ask the library of a GPU tensor for its current stream; None where that is not known."""
    root = _root_in(CURRENT_STREAM, tensor)
    return None if root is None else CURRENT_STREAM[root](sys.modules[root], device)


def finish(tensor: Any, device: int, stream: Any = None) -> None:
    """Wait, in this thread, until the library of a GPU tensor has computed it.

    ``stream`` is the one it is made on, where that is not the library's current one.
    """
    if callable(wait := getattr(stream, "synchronize", None)):
        wait()
    root = _root_in(FINISH, tensor)
    if root is not None:
        FINISH[root](sys.modules[root], tensor, device)


LEGACY, PER_THREAD = 1, 2  # CU_STREAM_LEGACY, CU_STREAM_PER_THREAD: the default streams


def handle_of(stream: Any) -> int:
    """Take a stream as a number or an object: CUDA's protocol, torch, cupy, cuda-bindings.

    The legacy default stream is 1, whether it is named so or 0.
    """
    try:
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            return int(protocol()[1]) or LEGACY
        for name in ("cuda_stream", "ptr"):
            handle = getattr(stream, name, None)
            if handle is not None:
                return int(handle) or LEGACY
        return int(stream) or LEGACY
    except Exception as error:
        raise InputError(
            f"stream is a {type(stream).__name__}; expected a CUDA stream as a number, or an "
            "object of torch, cupy or cuda-bindings"
        ) from error


def owner_of(stream: Any) -> object:
    """Give the object that keeps a stream from being destroyed; None where there is none.

    A number keeps nothing, nor do cuda-bindings' handles or the streams that torch and cupy call
    external. The legacy default stream is never destroyed.
    """
    if handle_of(stream) == LEGACY:
        return "the legacy default stream"
    owns = any(hasattr(stream, name) for name in ("__cuda_stream__", "cuda_stream", "ptr"))
    return stream if owns and type(stream).__name__ != "ExternalStream" else None


def _root_in(table: Mapping[str, object], tensor: Any) -> str | None:
    roots = (kind.__module__.partition(".")[0] for kind in type(tensor).__mro__)
    return next((root for root in roots if root in table and root in sys.modules), None)


def _module_of(tensor: Any) -> ModuleType | None:
    for kind in type(tensor).__mro__:
        module = sys.modules.get(kind.__module__.partition(".")[0])
        if callable(getattr(module, "from_dlpack", None)):
            return module
    return None


class Tensor:
    """Memory of ``shape`` and ``dtype``, row after row, that lives as long as someone uses it.

    ``torch.from_dlpack(tensor)``, ``cupy.from_dlpack(tensor)`` and their like take it without a
    copy. ``device`` is the GPU's index, None on the host; ``owner`` keeps the memory; ``wait``
    makes a stream wait until the values are there, None where they are.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        element: TensorType,
        device: int | None,
        owner: object,
        wait: Callable[[int], None] | None = None,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = str(element)
        self._element = element
        self._device = (CPU, 0) if device is None else (CUDA, device)
        self._owner = owner
        self._wait = wait

    def __repr__(self) -> str:
        where = "cpu" if self._device[0] == CPU else f"cuda:{self._device[1]}"
        return f"Tensor({list(self.shape)}, {self.dtype}, {where})"

    def array(self) -> NDArray[Any]:
        """Give a host tensor as NumPy can name it: bfloat16 is widened to float32."""
        array = array_at(self.pointer, self.shape, self._element, self._owner)
        return array if self._element.numpy else widen(array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Lend the memory where it lies, without a copy (array API: ``__dlpack__``).

        On a GPU ``stream`` will use it, and is made to wait; None is the legacy default stream, -1
        does not wait. ``max_version`` is the newest DLPack the taker knows.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self._device):
            raise BufferError(f"{self!r} is lent where it lies, without a copy")
        if self._wait is not None and stream != -1:
            self._wait(LEGACY if stream is None else handle_of(stream))
        array = array_at(self.pointer, self.shape, self._element, self._owner)
        versioned = max_version is not None and max_version[0] >= 1
        return lend(array, self._element, self._device, versioned=versioned)
