"""Outputs that further streams use: who waits for whom, and when their memory is written again."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from msn_export.errors import InputError
from msn_export.runtime import dlpack
from msn_export.runtime.context_pool import _IDLE as IDLE
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import BENCHES, Bench, make_bench

NETWORK = Network()


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = make_bench(request.param, monkeypatch)
    yield made
    made.recorder.live()
    assert made.problems() == []


def wanted(seed: int) -> np.ndarray[Any, Any]:
    return compute(NETWORK, NETWORK.images(3, seed))["embedding"]


def blocks(bench: Bench) -> int:
    """Count the blocks of output memory so far; each has an event of its own."""
    return bench.recorder.count("cuEventCreate")


def used_on(bench: Bench, other: int, runner: Any, seed: int, *, recorded: Any) -> Any:
    """Run, and copy the output on another stream, which has not done so when the output goes."""
    library = bench.library()
    outputs = runner(library.to_gpu(NETWORK.images(3, seed)))
    if recorded is not None:
        outputs.record_stream(recorded)
    first, library.stream = library.stream, other
    copied = library.copy(outputs.embedding)
    library.stream = first
    del outputs
    return copied


def read(bench: Bench, tensor: Any, stream: int) -> np.ndarray[Any, Any]:
    library = bench.library()
    first, library.stream = library.stream, stream
    values: np.ndarray[Any, Any] = library.to_host(tensor)
    library.stream = first
    return values


def test_a_recorded_stream_reads_what_was_computed_and_memory_is_used_again(bench) -> None:
    library = bench.library()
    other = library.new_stream()
    with bench.open() as runner:
        runner(library.to_gpu(NETWORK.images(3)))
        before = None
        for seed in range(3 * IDLE):
            stream = library.stream_object(other)
            copied = used_on(bench, other, runner, seed, recorded=stream)
            # whatever this call writes, it writes after the other stream has read
            runner(library.to_gpu(NETWORK.images(3, 1000 + seed)))
            np.testing.assert_array_equal(read(bench, copied, other), wanted(seed))
            before = blocks(bench) if before is None else before
        assert blocks(bench) == before
        assert bench.recorder.count("cuMemFree") == 0


def test_without_record_stream_the_memory_belongs_to_the_stream_of_the_call(bench) -> None:
    """So that line is needed: the stand-in shows what another stream may read without it."""
    if bench.is_real:
        pytest.skip("a race: a GPU may win it")
    library = bench.library()
    other = library.new_stream()
    with bench.open() as runner:
        copied = used_on(bench, other, runner, 0, recorded=None)
        library.to_host(runner(library.to_gpu(NETWORK.images(3, 1))).embedding)
        assert not np.array_equal(read(bench, copied, other), wanted(0))


def test_a_call_on_another_stream_than_the_current_uses_memory_again(bench) -> None:
    library = bench.library()
    current, called = library.new_stream(), library.new_stream()
    library.stream = current
    with bench.open() as runner:
        counts = []
        for seed in range(3 * IDLE):
            given = library.to_gpu(NETWORK.images(3, seed))
            output = runner(given, stream=library.stream_object(called)).embedding
            np.testing.assert_array_equal(library.to_host(output), wanted(seed))
            del output, given
            counts.append(blocks(bench))
        assert counts[-1] == counts[1]
        assert bench.recorder.count("cuMemFree") == 0
    library.stream = dlpack.LEGACY


def test_streams_take_memory_over_from_each_other_in_order(bench) -> None:
    library = bench.library()
    streams = [library.new_stream() for _ in range(2 * IDLE)]
    with bench.open() as runner:
        copies = []
        for seed, stream in enumerate(streams):
            library.stream = stream
            output = runner(library.to_gpu(NETWORK.images(3, seed))).embedding
            copies.append(library.copy(output))
            del output
        library.stream = dlpack.LEGACY
        for seed, (stream, copied) in enumerate(zip(streams, copies, strict=True)):
            np.testing.assert_array_equal(read(bench, copied, stream), wanted(seed))
        assert bench.recorder.count("cuMemFree") == 0
        assert blocks(bench) <= 3  # the slot's, and those of one block or two


def test_a_stream_known_by_its_number_alone_is_never_asked_and_its_memory_is_freed(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        for seed in range(2 * IDLE):
            other = library.new_stream()
            copied = used_on(bench, other, runner, seed, recorded=other)
            np.testing.assert_array_equal(read(bench, copied, other), wanted(seed))
            del copied
            library.forget_stream(other)  # the stand-in fails where it is asked after that
            runner(library.to_gpu(NETWORK.images(3, 1000 + seed)))
        assert bench.recorder.count("cuMemFree") > 0
    bench.settle()
    assert bench.recorder.live() == {}


def test_a_stream_that_its_library_lets_go_lives_until_its_memory_is_used_again(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        for seed in range(2 * IDLE):
            library.stream = stream = library.new_stream()
            output = runner(library.to_gpu(NETWORK.images(3, seed))).embedding
            np.testing.assert_array_equal(library.to_host(output), wanted(seed))
            library.stream = dlpack.LEGACY
            library.forget_stream(stream)
            del output
        assert bench.recorder.count("cuMemFree") == 0


def test_a_stream_that_is_being_captured_is_given_nothing(bench) -> None:
    if bench.is_real:
        pytest.skip("captures as the stand-in's stream does, not as torch")
    library = bench.library()
    other = library.new_stream()
    with bench.open() as runner:
        copied = used_on(bench, other, runner, 0, recorded=library.stream_object(other))
        bench.stand_in._streams[other].captured = []  # by a program, in another thread
        output = runner(library.to_gpu(NETWORK.images(3, 1))).embedding
        np.testing.assert_array_equal(library.to_host(output), wanted(1))
        assert bench.stand_in._streams[other].captured == []
        bench.stand_in._streams[other].captured = None
        np.testing.assert_array_equal(read(bench, copied, other), wanted(0))


def test_the_default_stream_per_thread_is_another_in_each_thread(bench) -> None:
    """It has one number in all of them, so no call is ordered after another by it."""
    if bench.is_real:
        pytest.skip("torch has no current stream of that name")
    library = bench.library()
    bench.stand_in._streams[dlpack.PER_THREAD] = type(bench.stand_in._streams[1])()
    with bench.open() as runner:
        seen = set()

        def run() -> None:
            given = library.to_gpu(NETWORK.images(3))
            outputs = runner(given, stream=dlpack.PER_THREAD)
            seen.add(library.pointer(outputs.embedding))

        for _ in range(2):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert len(seen) == 2


def test_outputs_on_the_host_need_no_stream_and_no_stream_is_told(bench) -> None:
    with bench.open() as runner:
        runner(NETWORK.images(2)).record_stream(7)
        given = bench.library().to_gpu(NETWORK.images(2))
        with pytest.raises(InputError, match="stream is a str; expected a CUDA stream as a n"):
            runner(given).record_stream("a stream")
        with pytest.raises(InputError, match="stream is a str; expected a CUDA stream as a n"):
            runner(given, stream="a stream")
