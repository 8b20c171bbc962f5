"""Any number of images is cut into batches that a profile accepts, each image once, in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import InputError
from msn_export.runtime.batches import Chunk, combine, split_batch
from msn_export.spec import BatchRange


def ranges():
    sizes = st.lists(st.integers(1, 40), min_size=3, max_size=3).map(sorted)
    return st.lists(sizes.map(lambda three: BatchRange(*three)), min_size=1, max_size=4)


@given(st.integers(1, 300), ranges())
def test_every_image_is_run_once_in_a_batch_its_profile_accepts(count, profiles) -> None:
    pieces = split_batch(count, profiles)
    seen = [image for piece in pieces for image in range(piece.start, piece.start + piece.count)]
    assert seen == list(range(count))
    for piece in pieces:
        profile = profiles[piece.profile]
        assert profile.min <= piece.size <= profile.max
        assert piece.count == piece.size or piece.count < profile.min
    padded = [piece for piece in pieces if piece.count < piece.size]
    assert padded in ([], [pieces[-1]])  # only the last can be too small


@given(st.integers(1, 100), ranges(), st.data())
def test_the_profile_asked_for_is_the_one_used(count, profiles, data) -> None:
    index = data.draw(st.integers(0, len(profiles) - 1))
    assert {piece.profile for piece in split_batch(count, profiles, index)} == {index}


@pytest.mark.parametrize(
    ("count", "profile", "size"),
    [(1, 0, 1), (2, 1, 4), (4, 1, 4), (8, 1, 8), (10, 2, 10), (16, 2, 16)],
)
def test_the_profile_tuned_nearest_is_taken(count, profile, size) -> None:
    profiles = [BatchRange(1, 1, 1), BatchRange(4, 4, 8), BatchRange(9, 16, 32)]
    assert split_batch(count, profiles) == (Chunk(0, count, size, profile),)


@pytest.mark.parametrize(("count", "profile", "size"), [(1, 1, 2), (4, 1, 4), (10, 0, 10)])
def test_of_profiles_that_overlap_the_one_that_pads_least_is_taken(count, profile, size) -> None:
    """The first is tuned nearer to one image, and accepts none below eight."""
    profiles = [BatchRange(8, 8, 16), BatchRange(2, 16, 32)]
    assert split_batch(count, profiles) == (Chunk(0, count, size, profile),)


def test_a_batch_above_the_largest_is_split() -> None:
    assert split_batch(70, [BatchRange(1, 8, 32)]) == (
        Chunk(0, 32, 32, 0), Chunk(32, 32, 32, 0), Chunk(64, 6, 6, 0)
    )  # fmt: skip


def test_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="there is no image in the batch; give at least one"):
        split_batch(0, [BatchRange()])


@pytest.mark.parametrize("profile", [-1, 2])
def test_a_profile_that_does_not_exist_is_refused(profile) -> None:
    with pytest.raises(InputError, match=f"profile {profile} does not exist; there are 2, from 0"):
        split_batch(1, [BatchRange(), BatchRange()], profile)


def test_profiles_together() -> None:
    assert combine([BatchRange(4, 8, 16), BatchRange(1, 1, 1)]) == BatchRange(1, 8, 16)
    assert combine([BatchRange(1, 1, 1), BatchRange(4, 8, 16)]) == BatchRange(1, 1, 16)
