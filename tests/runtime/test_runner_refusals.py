"""A batch that an artifact does not take is refused with what it takes and what to do."""

import numpy as np
import pytest
import torch

from msn_export.errors import InputError
from msn_export.runtime import open_runner
from msn_export.runtime.batches import pad, split_batch
from msn_export.runtime.runner import element_of, require_fit, top_k
from msn_export.spec import BatchRange, TensorSpec
from tests.builders.artifacts import classifier

PLANES = TensorSpec("x", "float", ("b", 3, 4, 6))


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        (
            "uint8",
            "float",
            "images are uint8; input 'x' takes float32; runner.preprocess() gives what it takes, "
            "normalised",
        ),
        ("float32", "float16", "images are float32; input 'x' takes float16"),
        (
            "float32",
            "bfloat16",
            "images are float32; input 'x' takes bfloat16; NumPy has no bfloat16, give a torch "
            "tensor",
        ),
    ],
)
def test_another_dtype_is_refused_with_what_gives_the_right_one(given, wanted, message) -> None:
    spec = TensorSpec("x", wanted, PLANES.shape)
    images = np.zeros((2, 3, 4, 6), given)
    with pytest.raises(InputError) as refused:
        require_fit(images.shape, element_of(images), spec)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 7), "images have shape [2, 3, 4, 7]; input 'x' takes [b, 3, 4, 6]"),
        ((2, 3, 4), "images have shape [2, 3, 4]; input 'x' takes [b, 3, 4, 6]"),
        (
            (3, 4, 6),
            "images have shape [3, 4, 6]; input 'x' takes [b, 3, 4, 6]; give one image as "
            "images[None]",
        ),
    ],
)
def test_another_shape_is_refused_and_one_image_is_told_what_to_do(shape, message) -> None:
    images = np.zeros(shape, np.float32)
    with pytest.raises(InputError) as refused:
        require_fit(images.shape, element_of(images), PLANES)
    assert str(refused.value) == message


def test_any_number_of_images_fits_and_any_size_where_it_is_open() -> None:
    element = element_of(np.zeros(1, np.float32))
    require_fit((9, 3, 4, 6), element, PLANES)
    require_fit((1, 3, 40, 60), element, TensorSpec("x", "float", ("b", 3, "h", "w")))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="images are <U1; expected a plain float, integer or bool"):
        element_of(np.array(["a"]))


def test_a_masked_array_is_refused_for_its_mask_would_be_lost() -> None:
    with pytest.raises(InputError, match=r"images are a masked array; fill .*images\.filled\(0\)"):
        element_of(np.ma.array(np.zeros(3, np.float32), mask=True))


class Raising:
    """An object that raises whatever it is asked for."""

    def __getattr__(self, name: str) -> object:
        raise ValueError(f"\x1b[31m {name}")


def test_an_object_that_raises_when_it_is_asked_is_no_image() -> None:
    with open_runner(classifier(), providers=["cpu"]) as runner:
        with pytest.raises(InputError, match="images are a Raising; expected a numpy array or"):
            runner(Raising())
        with pytest.raises(InputError, match="images are a list; expected a numpy array or a"):
            runner([Raising()])


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        ("x", 5, "logits are a str and k is 5; expected numbers [b, classes] on the host, and"),
        ([[1, 2], [3]], 5, "logits are a list and k is 5; expected numbers [b, classes] on the"),
        ([[object()]], 5, "logits are a list and k is 5; expected numbers [b, classes] on the"),
        (torch.ones(1, 3, device="meta"), 5, "logits are a Tensor and k is 5; expected numbers"),
        ([[1.0, 2.0]], "a", "logits are a list and k is 'a'; expected numbers [b, classes] on"),
        ([[1.0, 2.0]], 1.5, "logits are a list and k is 1.5; expected numbers [b, classes] on"),
        ([1.0, 2.0], 5, "logits have shape [2] and k is 5; expected [b, classes] and k of at"),
    ],
)
def test_logits_that_are_none_are_told(logits, k, message) -> None:
    with pytest.raises(InputError) as refused:
        top_k(logits, k=k)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("profile", [-1, 2, 0.5, "a", None.__class__])
def test_a_profile_that_does_not_exist_is_told(profile) -> None:
    with pytest.raises(InputError, match=r"^profile .* does not exist; there are 2, from 0 on$"):
        split_batch(4, (BatchRange(1, 1, 1), BatchRange(2, 4, 8)), profile)


def test_a_batch_is_filled_up_with_zeros() -> None:
    images = np.ones((2, 3), np.float32)
    assert pad(images, 2) is images
    np.testing.assert_array_equal(pad(images, 4), [[1] * 3] * 2 + [[0] * 3] * 2)
