"""Records that Ray moves hold what went into them, and nothing that Ray would have to guess."""

import numpy as np
import pytest

from msn_export.cluster.storage import (
    decode_pixels,
    decode_rows,
    encode_failure,
    encode_pixels,
    encode_rows,
)
from msn_export.embedding.inference import BEST, PictureBatch, Rows
from msn_export.errors import ClusterError, DeviceError


def plain(record: dict) -> bool:
    return all(isinstance(value, int | str | bytes) for value in record.values())


def test_pixels_come_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    hashes = np.random.default_rng(1).integers(0, 256, (3, 32), dtype=np.uint8)
    record = encode_pixels(12, PictureBatch(pixels, {1: "broken"}, 2, hashes))
    assert plain(record)
    start, got = decode_pixels(record)
    np.testing.assert_array_equal(got.pixels, pixels)
    np.testing.assert_array_equal(got.hashes, hashes)
    assert got.pixels.flags.writeable  # a runner may refuse what is not
    assert (start, got.errors, got.turned) == (12, {1: "broken"}, 2)


@pytest.mark.parametrize("classified", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (1, 5, 8)])
def test_rows_come_back(shape, classified) -> None:
    vectors = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    vectors[0] = np.nan
    best = np.zeros((shape[0], 2), BEST) if classified else None
    hashes = np.full((shape[0], 32), 7, np.uint8) if classified else None
    record = encode_rows(7, Rows(vectors, best, {0: "no picture"}, 3, hashes))
    assert plain(record)
    start, got = decode_rows(record)
    assert start == 7
    np.testing.assert_array_equal(got.vectors, vectors)
    assert (got.errors, got.turned) == ({0: "no picture"}, 3)
    if classified:
        np.testing.assert_array_equal(got.best, best)
        np.testing.assert_array_equal(got.hashes, hashes)
    else:
        assert got.best is None
        assert got.hashes is None


def test_a_failure_comes_as_a_record_and_is_raised_where_it_is_read() -> None:
    record = encode_failure(DeviceError("GPU 0 is lost"))
    assert plain(record)
    assert record.keys() == encode_rows(0, Rows(np.zeros((1, 2), np.float32))).keys()
    with pytest.raises(DeviceError) as failed:
        decode_rows(record)
    assert str(failed.value) == "GPU 0 is lost"


@pytest.mark.parametrize("name", ["OfANewerVersionError", "annotations", "MsnExportError.mro"])
def test_a_failure_of_a_type_that_is_not_known_is_the_clusters(name) -> None:
    record = encode_failure(DeviceError("x")) | {"failure": f'["{name}", "text"]'}
    with pytest.raises(ClusterError) as failed:
        decode_rows(record)
    assert (type(failed.value), str(failed.value)) == (ClusterError, "text")
