"""Tensors are read and lent in place; what frees them loses no exception."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import InputError
from msn_export.runtime import dlpack
from msn_export.runtime.dlpack import ELEMENTS, OF_NUMPY, OF_ONNX, Tensor, widen


class Owner:
    """Something that keeps memory."""


def lent(array: np.ndarray, element: str, owner: object = None, device: int | None = None):
    return Tensor(array.ctypes.data, array.shape, OF_ONNX[element], device, owner)


@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "uint8", "int8", "int32",
                                  "int64", "bool"])  # fmt: skip
def test_every_dtype_goes_through_torch_and_back_in_place(kind) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    taken = torch.from_dlpack(lent(array, OF_NUMPY[array.dtype].onnx))
    assert taken.data_ptr() == array.ctypes.data
    assert taken.numpy().dtype == array.dtype
    np.testing.assert_array_equal(taken.numpy(), array)
    borrowed = dlpack.borrow(taken)
    assert borrowed.pointer == array.ctypes.data
    assert borrowed.element is OF_NUMPY[array.dtype]
    assert borrowed.device is None
    np.testing.assert_array_equal(borrowed.array(), array)


def test_bfloat16_goes_both_ways_though_numpy_cannot_name_it() -> None:
    values = torch.tensor([1.0, -2.5, 3.0e38, 1e-40]).bfloat16()
    borrowed = dlpack.borrow(values)
    assert str(borrowed.element) == "bfloat16"
    assert borrowed.array().dtype == np.uint16
    np.testing.assert_array_equal(widen(borrowed.array()), values.float().numpy())
    again = torch.from_dlpack(lent(borrowed.array(), "bfloat16", borrowed))
    assert again.dtype is torch.bfloat16
    assert torch.equal(again, values)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.permutations(range(4)))
def test_any_strides_are_read_right(shape, order) -> None:
    axes = [axis for axis in order if axis < len(shape)]
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).transpose(axes)
    borrowed = dlpack.borrow(array)
    np.testing.assert_array_equal(borrowed.array(), array)
    assert borrowed.is_contiguous == array.flags.c_contiguous
    sliced = array[::2]
    np.testing.assert_array_equal(dlpack.borrow(sliced).array(), sliced)


def test_memory_lives_as_long_as_whoever_took_it() -> None:
    owner, array = Owner(), np.ones(4, np.float32)
    seen = weakref.ref(owner)
    tensor = lent(array, "float", owner)
    del owner
    taken = torch.from_dlpack(tensor)
    view = np.from_dlpack(tensor)
    del tensor
    for last in (taken, view):
        assert seen() is not None
        assert last[0] == 1
    del taken, last
    assert seen() is not None
    del view
    gc.collect()
    assert seen() is None


def test_a_capsule_that_nobody_takes_frees_its_memory() -> None:
    for version in (None, (1, 0)):
        owner = Owner()
        seen = weakref.ref(owner)
        capsule = lent(np.ones(4, np.float32), "float", owner).__dlpack__(max_version=version)
        del owner
        assert seen() is not None
        del capsule
        assert seen() is None


def test_freeing_while_an_exception_is_raised_keeps_the_exception() -> None:
    def fail() -> None:
        taken = torch.from_dlpack(lent(np.ones(4, np.float32), "float", Owner()))
        capsule = lent(np.ones(4, np.float32), "float", Owner()).__dlpack__()
        raise ValueError(f"{taken.shape} {capsule is not None}")

    with pytest.raises(ValueError, match="True"):
        fail()


def test_a_gpu_tensor_is_refused_by_who_cannot_take_it_and_nothing_leaks() -> None:
    owner = Owner()
    seen = weakref.ref(owner)
    tensor = lent(np.ones(4, np.float32), "float", owner, device=0)
    del owner
    assert tensor.__dlpack_device__() == (2, 0)
    with pytest.raises((RuntimeError, BufferError)):
        np.from_dlpack(tensor)
    assert seen() is not None
    del tensor
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"copy": True}, True),
        ({"dl_device": (2, 0)}, True),
        ({"dl_device": (1, 0)}, False),
        ({"copy": False, "max_version": (1, 0)}, False),
    ],
)
def test_it_is_lent_where_it_lies(options, refused) -> None:
    tensor = lent(np.ones(4, np.float32), "float")
    if not refused:
        assert tensor.__dlpack__(**options) is not None
        return
    with pytest.raises(BufferError, match=r"Tensor\(\[4\], float32, cpu\) is lent where it lies"):
        tensor.__dlpack__(**options)


def test_an_older_library_without_versions_is_understood() -> None:
    class Old:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, stream=None):
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return (1, 0)

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(dlpack.borrow(Old(array)).array(), array)


@pytest.mark.parametrize(
    ("device", "stream", "asked"),
    [((2, 0), 0, 1), ((2, 0), 7, 7), ((2, 0), None, "none"), ((1, 0), 7, "none")],
)
def test_a_library_is_asked_to_let_the_stream_that_reads_wait(device, stream, asked) -> None:
    class Asked:
        def __dlpack__(self, stream="none", **_options):
            self.stream = stream
            raise BufferError("not lent")

        def __dlpack_device__(self):
            return device

    tensor = Asked()
    with pytest.raises(InputError):
        dlpack.borrow(tensor, stream)
    assert tensor.stream == asked


class Odd:
    """A tensor with one thing wrong."""

    def __init__(self, device=(1, 0), capsule=object()) -> None:  # noqa: B008
        self.device, self.capsule = device, capsule

    def __dlpack__(self, **_options):
        return self.capsule

    def __dlpack_device__(self):
        return self.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_tensor_that_is_stored_negated_is_read_with_its_sign(dtype) -> None:
    stored = torch.arange(6, dtype=dtype).reshape(2, 3)
    given = torch._neg_view(stored)
    assert given.is_neg()
    np.testing.assert_array_equal(dlpack.borrow(given).array(), -stored.numpy())
    assert torch.equal(stored, torch.arange(6, dtype=dtype).reshape(2, 3))


def test_so_is_the_imaginary_part_of_a_conjugate() -> None:
    parts = torch.complex(torch.ones(4), torch.arange(4.0))
    given = parts.conj().imag
    assert given.is_neg()
    np.testing.assert_array_equal(dlpack.borrow(given).array(), [-0.0, -1, -2, -3])


def test_an_array_that_is_read_only_is_read() -> None:
    """DLPack before 1.0 cannot say so, and NumPy lends none to who does not know 1.0."""
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = False
    np.testing.assert_array_equal(dlpack.borrow(array).array(), array)


def test_a_tensor_without_elements_needs_no_memory() -> None:
    assert dlpack.borrow(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0], "images are a list; expected a numpy array or a tensor with DLPack"),
        (Odd(device=(4, 0)), "lie on a device of DLPack's kind 4; expected the host or an NVIDIA"),
        (Odd(), "gave no DLPack capsule that can be read"),
        (Odd(device="cuda"), "the images' Odd cannot be read in place: "),
        (Odd(device=(1, 0, 0)), "the images' Odd cannot be read in place: too many values"),
        (Odd(device=(10**30, 0)), "lie on a device of DLPack's kind 1000"),
        (Odd(device=(-1, 0)), "lie on a device of DLPack's kind -1; expected the host or an NVI"),
        (Odd(capsule=5), "gave no DLPack capsule that can be read"),
        (torch.ones(2).to(torch.complex64), "of DLPack's dtype 5, 64 bits, 1 lanes; expected a"),
        (torch.ones(2, requires_grad=True), r"cannot be read in place: .*use tensor\.detach\(\)"),
        (torch.ones(2).to(torch.complex64).conj(), "of DLPack's dtype 5, 64 bits, 1 lanes; expec"),
        (torch.ones(2, device="meta"), "the images' Tensor cannot be read in place: .*meta"),
        (torch._efficientzerotensor(2, 3), r"the images' Tensor of \[2, 3\] has no memory"),
    ],
)
def test_what_cannot_be_read_is_told(bad, message) -> None:
    with pytest.raises(InputError, match=message):
        dlpack.borrow(bad)


def test_one_row_a_dtype() -> None:
    for key in ("onnx", "number", "tensorrt"):
        names = [getattr(element, key) for element in ELEMENTS if getattr(element, key)]
        assert len(set(names)) == len(names)
    import onnx

    for element in ELEMENTS:
        assert onnx.TensorProto.DataType.Value(element.onnx.upper()) == element.number
        assert element.storage.itemsize * 8 == element.bits
