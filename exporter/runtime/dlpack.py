"""DLPack: read a tensor of any library in place, and lend memory to any library.

The structures are those of dlpack.h, DLPack 1.1 (github.com/dmlc/dlpack). NumPy makes the capsules
that are lent, around memory it never touches, and this module writes the true device and dtype into
them: so what frees a capsule is NumPy's C code. A destructor written in Python would lose the
exception that is being raised when it is called.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import InputError, MsnExportError
from msn_export.runtime.dtypes import OF_DLPACK, TensorType

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
        """Whether the values lie row after row without gaps."""
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


def device_of(tensor: Any) -> int | None:
    """Tell which GPU a DLPack tensor lies on; None for the host.

    Raises:
        InputError: it is no tensor, or lies on neither.
    """
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
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

    Args:
        tensor: anything with ``__dlpack__``.
        stream: for a tensor on a GPU, the stream that will read it: its library makes that
            stream wait for what it still computes. 0 is the legacy default stream.

    Raises:
        InputError: its library does not lend it, or its dtype is none we know.
    """
    device = device_of(tensor)
    # the array API names the legacy default stream 1: 0 would be ambiguous
    wait: dict[str, Any] = {} if device is None or stream is None else {"stream": stream or 1}
    try:
        for resolve in ("resolve_conj", "resolve_neg"):
            tensor = getattr(tensor, resolve, lambda known=tensor: known)()
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

    Args:
        array: made by ``array_at``, so that its owner lives until the capsule's taker is done.
        element: the dtype to name, where NumPy cannot.
        device: DLPack's device type and index, where the memory is not the host's.
        versioned: whether the taker knows DLPack 1.
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
    """Find the tensor in a capsule that nobody has taken yet."""
    for name, kind in zip(_NAMES, (_ManagedVersioned, _Managed), strict=True):
        if _is_valid(capsule, name):
            managed = kind.from_address(_get_pointer(capsule, name))
            if getattr(managed, "major", 1) != 1:
                raise InputError(f"images use DLPack {managed.major}; expected 0 or 1")
            found: _Tensor = managed.tensor
            return found
    raise InputError("the images' library gave no DLPack capsule that can be read")
