"""The TensorRT runner's state machine, over stand-ins here and, unchanged, on a GPU (-m gpu)."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from msn_export.errors import DeviceError, GraphError, InputError, RunnerError
from msn_export.runtime import context_pool
from msn_export.runtime.context_pool import _ATTEMPTS as ATTEMPTS
from msn_export.runtime.context_pool import _IDLE as IDLE
from msn_export.runtime.context_pool import _PAUSE as PAUSE
from msn_export.runtime.context_pool import LIMIT
from msn_export.runtime.cuda import Gpu
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import BENCHES, Bench, make_bench
from tests.fakes import tensorrt_stand_in

NETWORK = Network()
TWO = Network(profiles=((1, 1, 1), (4, 8, 16)))


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = make_bench(request.param, monkeypatch)
    yield made
    made.recorder.live()  # what is garbage by now goes, and is judged
    assert made.problems() == []


def wanted(network: Network, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    return compute(network, images)


def check(outputs: Any, network: Network, images: np.ndarray[Any, Any]) -> None:
    expected = wanted(network, images)
    assert list(outputs) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(outputs[name]), values)


def test_what_it_says_of_itself(bench) -> None:
    with bench.open(TWO) as runner:
        assert runner.name == f"{bench.machine.loaded}, {bench.machine.device.name}"
        (images,) = runner.inputs
        assert (images.name, images.dtype, images.shape[1:]) == ("pixel_values", "float", (3, 2, 2))
        assert [spec.name for spec in runner.outputs] == ["embedding", "odd"]
        assert str(runner.batch) == "1:1:16"
        assert [str(profile) for profile in runner.profiles] == ["1:1:1", "4:8:16"]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 23])
def test_any_number_of_images_gives_one_row_each(bench, count) -> None:
    images = NETWORK.images(count)
    with bench.open() as runner:
        outputs = runner(images)
        check(outputs, NETWORK, images)
        np.testing.assert_array_equal(outputs.embedding, outputs["embedding"])


@pytest.mark.parametrize("count", [1, 2, 4, 16, 17, 18, 40])
def test_batches_between_and_outside_profiles_are_padded_and_split(bench, count) -> None:
    images = TWO.images(count)
    with bench.open(TWO) as runner:
        check(runner(images), TWO, images)


def test_every_profile_can_be_asked_for(bench) -> None:
    images = TWO.images(3)
    with bench.open(TWO) as runner:
        for profile in (0, 1, 0):
            check(runner(images, profile=profile), TWO, images)


def test_a_fixed_batch_is_padded_and_split_too(bench) -> None:
    network = Network(profiles=((4, 4, 4),), is_static=True)
    with bench.open(network) as runner:
        assert str(runner.batch) == "4:4:4"
        for count in (1, 4, 6):
            images = network.images(count)
            check(runner(images), network, images)


@pytest.mark.parametrize("dtype", ["float", "uint8"])
@pytest.mark.parametrize("output", ["float", "float16", "bfloat16"])
def test_dtypes_on_the_host_and_on_the_gpu(bench, dtype, output) -> None:
    network = Network(dtype=dtype, outputs=(("embedding", output, 8),))
    images = network.images(5)
    exact = network.images(5).reshape(5, -1).astype(np.float32)
    same = Network(dtype=dtype, outputs=(("embedding", "float", 8),))
    expected = wanted(same, images)["embedding"]
    assert exact.max() <= 3
    with bench.open(network) as runner:
        on_host = runner(images).embedding
        assert on_host.dtype == {"float16": np.float16}.get(output, np.float32)
        np.testing.assert_array_equal(on_host.astype(np.float32), expected)
        library = bench.library()
        on_gpu = library.to_host(runner(library.to_gpu(images)).embedding)
        np.testing.assert_array_equal(on_gpu.astype(np.float32), expected)


def test_runs_that_come_up_again_are_captured_and_give_the_same(bench) -> None:
    with bench.open() as runner:
        for seed in range(4):
            for count in (1, 3):
                images = NETWORK.images(count, seed)
                check(runner(images), NETWORK, images)
        if bench.captures:
            assert bench.recorder.count("cuStreamBeginCapture") == 2
            assert bench.recorder.count("cuGraphLaunch") == 4  # eager, captured, then replayed
            assert runner.cuda_graphs == "2 captured"
        else:
            assert bench.recorder.count("cuStreamBeginCapture") == 0
            assert runner.cuda_graphs == "TensorRT-RTX's own"


def test_without_cuda_graphs_nothing_is_captured(bench) -> None:
    with bench.open(cuda_graphs=False) as runner:
        for seed in range(3):
            images = NETWORK.images(2, seed)
            check(runner(images), NETWORK, images)
        assert runner.cuda_graphs == "off"
    assert bench.recorder.count("cuStreamBeginCapture") == 0


@pytest.mark.parametrize("eager", [False, True])
def test_kernels_are_compiled_before_or_behind_the_first_run(bench, eager) -> None:
    images = NETWORK.images(3)
    with bench.open(eager_kernels=eager) as runner:
        check(runner(images), NETWORK, images)
        if not bench.is_real:
            used = {
                one.dynamic_shapes_kernel_specialization_strategy.name
                for one in bench.stand_in._configs
            }
            assert used == ({"EAGER" if eager else "LAZY"} if bench.contexts == "config" else set())


def test_graphs_are_bounded_and_give_way_only_to_what_came_up_twice_since(bench) -> None:
    network = Network(profiles=((1, 4, 2 * LIMIT + 2),))
    with bench.open(network) as runner:
        for _ in range(4):
            for count in range(1, 2 * LIMIT + 1):
                check(runner(network.images(count)), network, network.images(count))
        captures = bench.recorder.count("cuStreamBeginCapture")
        assert captures == (LIMIT if bench.captures else 0)  # the others do not push them out
        for _ in range(2):  # no turn later: the graph that made room is gone by then
            runner(network.images(2 * LIMIT + 2))
        assert bench.recorder.count("cuStreamBeginCapture") == captures + bench.captures
        runner(network.images(2 * LIMIT + 2))
        assert bench.recorder.count("cuStreamBeginCapture") == captures + bench.captures
        assert bench.recorder.count("cuGraphExecDestroy") == (1 if bench.captures else 0)


def test_outputs_of_one_call_survive_the_next(bench) -> None:
    with bench.open() as runner:
        first = runner(NETWORK.images(2, 0))
        runner(NETWORK.images(2, 1))
        check(first, NETWORK, NETWORK.images(2, 0))


def test_memory_is_allocated_once(bench) -> None:
    with bench.open() as runner:
        library = bench.library()
        for seed in range(3):
            runner(NETWORK.images(9, seed))
            library.to_host(runner(library.to_gpu(NETWORK.images(9, seed))).embedding)
        made = bench.recorder.count("cuMemAlloc")
        pinned = bench.recorder.count("cuMemHostAlloc")
        for seed in range(20):
            runner(NETWORK.images(1 + seed % 9, seed))
            library.to_host(runner(library.to_gpu(NETWORK.images(9, seed))).embedding)
        assert bench.recorder.count("cuMemAlloc") == made
        assert bench.recorder.count("cuMemHostAlloc") == pinned == 3


class OnHost:
    """A tensor on the host, of a library that is not known."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_tensors_on_the_host_are_read_in_place_and_fit_too(bench) -> None:
    images = NETWORK.images(3)
    with bench.open() as runner:
        outputs = runner(OnHost(images))
        for name, values in wanted(NETWORK, images).items():
            np.testing.assert_array_equal(np.from_dlpack(outputs[name]), values)
        with pytest.raises(InputError, match=r"have shape \[3, 3, 1, 2\]; input 'pixel_values'"):
            runner(OnHost(images[:, :, :1]))


# on the GPU


def test_gpu_tensors_stay_on_the_gpu_without_a_copy(bench) -> None:
    # rows of 256 bytes, in and out: every piece begins at an aligned address
    network = Network(outputs=(("embedding", "float", 64),), sizes=(16, 2, 2))
    library, images = bench.library(), network.images(19)
    with bench.open(network) as runner:
        given = library.to_gpu(images)
        output = runner(given).embedding
        assert type(output) is type(given)
        np.testing.assert_array_equal(library.to_host(output), wanted(network, images)["embedding"])
        used = bench.recorder
        for copy in ("HtoD", "DtoH", "DtoD"):
            assert used.count(f"cuMemcpy{copy}Async") == 0
        assert used.count("cuMemHostAlloc") == 0


def test_outputs_on_the_gpu_outlive_the_runner(bench) -> None:
    library, images = bench.library(), NETWORK.images(3)
    runner = bench.open()
    output = runner(library.to_gpu(images)).embedding
    runner.close()
    np.testing.assert_array_equal(library.to_host(output), wanted(NETWORK, images)["embedding"])
    del output
    bench.settle()
    assert bench.recorder.live() == {}


@pytest.mark.parametrize("count", [1, 3, 8, 9, 20])
def test_unaligned_and_padded_gpu_tensors_are_moved_and_right(bench, count) -> None:
    network = Network(profiles=((2, 4, 8),))
    library, images = bench.library(), network.images(count)
    with bench.open(network) as runner:
        outputs = runner(library.to_gpu(images, offset=16))
        for name, values in wanted(network, images).items():
            np.testing.assert_array_equal(library.to_host(outputs[name]), values)


def test_the_callers_stream_orders_the_run(bench) -> None:
    library, images = bench.library(), NETWORK.images(4)
    stream = library.new_stream()
    with bench.open() as runner:
        for seed in range(4):
            images = NETWORK.images(4, seed)
            library.stream = stream
            given = library.to_gpu(images)  # not there yet: the stream has it to do
            outputs = runner(given, stream=stream)
            del given  # its memory may be given to the next as soon as the stream allows
            copied = library.copy(outputs.embedding)
            del outputs
            np.testing.assert_array_equal(
                library.to_host(copied), wanted(NETWORK, images)["embedding"]
            )
        library.stream = 1


def test_the_librarys_current_stream_is_found(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        waits = bench.recorder.count("cuStreamSynchronize")
        for stream in (library.new_stream(), 1):
            library.stream = stream
            for seed in range(3):
                images = NETWORK.images(2, seed)
                output = runner(library.to_gpu(images)).embedding
                copied = library.copy(output)
                del output
                np.testing.assert_array_equal(
                    library.to_host(copied), wanted(NETWORK, images)["embedding"]
                )
        if not bench.captures:  # capturing waits once, at the end of what it frees
            assert bench.recorder.count("cuStreamSynchronize") == waits


@pytest.mark.parametrize("dropped", ["before the output is read", "after"])
def test_the_call_may_have_another_stream_than_the_library(bench, dropped) -> None:
    library = bench.library()
    current, called = library.new_stream(), library.new_stream()
    with bench.open() as runner:
        for seed in range(4):
            images = NETWORK.images(3, seed)
            library.stream = current
            given = library.to_gpu(images)  # still to be computed, in the current stream
            outputs = runner(given, stream=called)
            if dropped != "after":
                library.stream = called
                del given  # what comes next in that stream may overwrite it
                library.to_host(library.to_gpu(images))
                library.stream = current
            np.testing.assert_array_equal(
                library.to_host(outputs.odd), wanted(NETWORK, images)["odd"]
            )
            del outputs
        library.stream = 1


class Bare:
    """A tensor of a library that is not known and takes nothing back."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.tensor.__dlpack_device__()
        return device


def test_a_library_that_is_not_known_gets_outputs_that_are_there(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        for stream in (1, library.new_stream()):
            library.stream = stream
            for seed in range(4):
                images = NETWORK.images(3, seed)
                given = library.to_gpu(images)
                outputs = runner(Bare(given))
                del given
                library.to_host(library.to_gpu(images))  # overwrites what was given
                assert outputs.odd.shape == (3, 3)
                assert repr(outputs.odd) == "Tensor([3, 3], float32, cuda:0)"
                taken = library.take(outputs.odd)
                np.testing.assert_array_equal(
                    library.to_host(taken), wanted(NETWORK, images)["odd"]
                )
                with pytest.raises(BufferError, match="is lent where it lies, without a copy"):
                    outputs.odd.__dlpack__(copy=True)
        library.stream = 1


def test_a_block_goes_back_to_its_stream_alone(bench) -> None:
    """An output dropped on one stream is not overwritten by a call ordered after another."""
    library = bench.library()
    first, second = library.new_stream(), None
    with bench.open() as runner:
        library.stream = first
        images = NETWORK.images(2, 0)
        output = runner(library.to_gpu(images)).embedding
        copied = library.copy(output)  # waits in the first stream
        del output
        library.stream = second = 1
        other = runner(library.to_gpu(NETWORK.images(2, 1))).embedding
        library.to_host(other)
        library.stream = first
        np.testing.assert_array_equal(library.to_host(copied), wanted(NETWORK, images)["embedding"])
        library.stream = second


def test_dropped_outputs_are_used_again(bench) -> None:
    library, seen = bench.library(), set()
    with bench.open() as runner:
        for seed in range(12):
            output = runner(library.to_gpu(NETWORK.images(2, seed))).embedding
            seen.add(library.pointer(output))
            library.to_host(output)
            del output
        assert len(seen) <= 2


def test_what_is_kept_for_later_is_bounded(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        few, many = (library.to_gpu(NETWORK.images(count)) for count in (2, 8))
        held = [runner(few).embedding for _ in range(IDLE + 1)]
        del held
        bench.settle()
        output = runner(many).embedding  # needs a larger block
        assert bench.recorder.count("cuMemFree") == 2
        del output


# misuse


def test_what_does_not_fit_is_refused(bench) -> None:
    library = bench.library()
    with bench.open() as runner:
        images = NETWORK.images(4)
        for bad, message in (
            (images.astype(np.float64), "images are float64; input 'pixel_values' takes float32"),
            (images[0], r"takes \[b, 3, 2, 2\]; give one image as images\[None\]"),
            (images[:, :, :1], r"have shape \[4, 3, 1, 2\]; input 'pixel_values' takes"),
            (images[:0], "there is no image in the batch"),
            ([1, 2], "images are a list; expected a numpy array or a tensor with DLPack"),
            (library.to_gpu(images.astype(np.float16)), "images are float16"),
            (library.strided(library.to_gpu(images)), "images are not contiguous"),
        ):
            with pytest.raises(InputError, match=message):
                runner(bad)
        check(runner(images), NETWORK, images)


class Elsewhere(Bare):
    """A tensor that says it lies on another GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1


def test_images_on_another_gpu_are_refused(bench) -> None:
    with bench.open() as runner:
        given = Elsewhere(bench.library().to_gpu(NETWORK.images(1)))
        with pytest.raises(InputError, match="images lie on GPU 1; this runner is on GPU 0"):
            runner(given)


def test_a_profile_that_does_not_exist_is_refused(bench) -> None:
    with bench.open() as runner, pytest.raises(InputError, match="profile 1 does not exist; ther"):
        runner(NETWORK.images(1), profile=1)


def test_a_closed_runner_is_refused_and_closing_again_does_nothing(bench) -> None:
    runner = bench.open()
    runner(NETWORK.images(1))
    runner.close()
    runner.close()
    with pytest.raises(RunnerError, match="is closed; open another"):
        runner(NETWORK.images(1))
    assert bench.recorder.live() == {}


def test_bytes_that_are_no_engine_are_refused_and_nothing_stays(bench) -> None:
    bench.plan = lambda _network: b"ftrt" + bytes(200)
    with pytest.raises(DeviceError, match=r"refuses m\.engine: "):
        bench.open()
    assert bench.recorder.live() == {}


# threads


def test_eight_threads_get_their_own_answers(bench) -> None:
    library, calls = bench.library(), 60 if not bench.is_real else 500
    failures: list[str] = []

    def work(thread: int) -> None:
        for call in range(calls):
            images = NETWORK.images(1 + (thread + call) % 9, thread * calls + call)
            try:
                check(runner(images), NETWORK, images)
            except BaseException as error:  # noqa: BLE001
                failures.append(repr(error))

    with bench.open(contexts=3) as runner:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        contexts = bench.recorder.count("cuStreamCreate")
    assert failures == []
    assert contexts <= 3
    assert library is not None
    assert bench.recorder.live() == {}


def test_closing_waits_for_calls_under_way_and_refuses_the_rest(bench) -> None:
    runner = bench.open(contexts=1)
    images, outcomes = NETWORK.images(2), []

    def work() -> None:
        for _ in range(50):
            try:
                check(runner(images), NETWORK, images)
            except RunnerError as error:
                outcomes.append(str(error))
                return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    runner.close()
    for thread in threads:
        thread.join()
    assert all("is closed" in text for text in outcomes)
    assert bench.recorder.live() == {}


# leaks and failures


def test_calls_leak_nothing(bench) -> None:
    calls = 5_000 if bench.is_real else 100  # a stand-in counts each byte, a card does not
    images = NETWORK.images(2)
    library = bench.library()
    given = library.to_gpu(images)
    with bench.open() as runner:
        for _ in range(5):
            runner(images)
            runner(given)
        bench.settle()
        before, live = bench.free_memory(), bench.recorder.live()
        for _ in range(calls):
            runner(images)
            runner(given)
        bench.settle()
        assert bench.recorder.live() == live
        assert bench.free_memory() >= before - (64 << 20 if bench.is_real else 0)
    bench.settle()
    assert bench.recorder.live() == {}


def script(bench: Bench) -> None:
    """Open, run on the host and on the GPU often enough to replay graphs, close."""
    library = bench.library()
    images = NETWORK.images(9)
    with bench.open() as runner:
        for _ in range(3):  # eager, captured, replayed
            check(runner(images), NETWORK, images)
            given = library.to_gpu(images)
            output = runner(given).embedding
            np.testing.assert_array_equal(
                library.to_host(output), wanted(NETWORK, images)["embedding"]
            )
            del output, given


def warm_up(bench: Bench) -> None:
    """Have, before calls are counted, what is made once: primary context and runtime cache."""
    script(bench)
    bench.settle()
    bench.recorder.calls.clear()


def numbers_to_fail(bench: Bench) -> list[int]:
    """List every call; on a card, where opening takes seconds, each function's first and last."""
    calls = bench.recorder.calls
    if not bench.is_real:
        return list(range(len(calls)))
    last = {name: number for number, name in enumerate(calls)}
    first = {name: number for number, name in reversed(list(enumerate(calls)))}
    return sorted({*first.values(), *last.values()})


def test_whichever_call_fails_it_is_our_error_and_nothing_stays_allocated(bench) -> None:
    warm_up(bench)
    script(bench)
    bench.settle()
    assert bench.recorder.live() == {}
    told = set()
    for number in numbers_to_fail(bench):
        bench.recorder.calls.clear()
        bench.recorder.fail_at = number
        try:
            script(bench)
        except DeviceError as error:
            told.add(bench.recorder.calls[number])
            assert "\n" not in str(error)
        finally:
            bench.recorder.fail_at = None
        bench.settle()
        name = bench.recorder.calls[number]
        assert bench.recorder.live() == {}, f"call {number}, {name}, leaves something"
        assert bench.problems() == [], f"call {number}, {name}"
    # a graph that cannot be captured is no error: the run is done without it
    capturing = {"cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"}
    # nor is a runtime cache that cannot be had
    caching = {"create_runtime_cache", "set_runtime_cache", "serialize", "deserialize"}
    told |= capturing | caching
    assert set(bench.recorder.calls) - told <= {"cuGraphDestroy", "execute_async_v3"}
    assert {"cuMemAlloc", "cuMemFree", "cuStreamSynchronize", "Runtime"} <= told


@pytest.mark.parametrize(
    "name", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "set_tensor_address", "execute_async_v3"]
)
def test_after_a_failed_call_the_runner_goes_on(bench, name) -> None:
    images = NETWORK.images(3)
    with bench.open(cuda_graphs=False) as runner:
        check(runner(images), NETWORK, images)
        bench.recorder.calls.clear()
        runner(images)
        number = bench.recorder.calls.index(name)
        bench.recorder.calls.clear()
        bench.recorder.fail_at = number
        with pytest.raises(DeviceError):
            runner(images)
        bench.recorder.fail_at = None
        check(runner(images), NETWORK, images)
    assert bench.recorder.live() == {}


def test_a_graph_that_cannot_be_captured_is_told_and_tried_again_later(bench) -> None:
    if not bench.captures:
        pytest.skip("TensorRT-RTX captures by itself")
    images = NETWORK.images(2)
    with bench.open() as runner:
        runner(images)
        bench.recorder.calls.clear()
        runner(images)
        number = bench.recorder.calls.index("cuStreamBeginCapture")
    with bench.open() as runner:
        runner(images)
        bench.recorder.calls.clear()
        bench.recorder.fail_at = number
        check(runner(images), NETWORK, images)
        bench.recorder.fail_at = None
        assert bench.recorder.count("execute_async_v3") == 1  # it was done, and is not done again
        assert re.fullmatch(
            "0 captured; cuStreamBeginCapture failed: .*; it is tried again later",
            runner.cuda_graphs,
        )
        for _ in range(PAUSE - 1):
            check(runner(images), NETWORK, images)
        assert bench.recorder.count("cuStreamBeginCapture") == 1
        check(runner(images), NETWORK, images)
        assert runner.cuda_graphs == "1 captured"


def test_a_graph_that_never_can_be_captured_is_tried_a_few_times(bench, monkeypatch) -> None:
    if not bench.captures:
        pytest.skip("TensorRT-RTX captures by itself")
    tried = []

    def refuse(_gpu: Gpu, _stream: Any, _enqueue: Any) -> Any:
        tried.append(1)
        raise DeviceError("cuGraphInstantiate failed: CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(Gpu, "capture", refuse)
    monkeypatch.setattr(context_pool, "_PAUSE", 1)
    with bench.open() as runner:
        for seed in range(4**ATTEMPTS):
            runner(NETWORK.images(1, seed))
        assert len(tried) == ATTEMPTS
        assert runner.cuda_graphs == (
            "0 captured; cuGraphInstantiate failed: CUDA_ERROR_OUT_OF_MEMORY; it is not tried again"
        )


def test_a_context_that_tensorrt_does_not_make_is_told(bench) -> None:
    warm_up(bench)
    script(bench)
    made = (name.startswith("create_execution_context") for name in bench.recorder.calls)
    number = list(made).index(True)
    bench.recorder.calls.clear()
    bench.recorder.fail_at = number
    with pytest.raises(DeviceError, match=r"makes no context for m\.engine: it does not say why"):
        script(bench)
    assert bench.recorder.live() == {}


def test_a_gpu_without_room_says_what_to_do(bench) -> None:
    if bench.is_real:
        pytest.skip("fills no real GPU")
    runner = bench.open()
    bench.stand_in._room = 2048
    with pytest.raises(DeviceError, match=r"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY; free"):
        runner(NETWORK.images(1))
    bench.stand_in._room = 1 << 30
    check(runner(NETWORK.images(1)), NETWORK, NETWORK.images(1))
    runner.close()
    assert bench.recorder.live() == {}


def test_an_engine_of_two_inputs_is_refused(bench, monkeypatch) -> None:
    if bench.is_real:
        pytest.skip("the compiler here makes none")
    mode = tensorrt_stand_in._Engine.get_tensor_mode

    def is_input(engine: Any, name: str) -> Any:
        return mode(engine, "pixel_values" if name == "odd" else name)

    monkeypatch.setattr(tensorrt_stand_in._Engine, "get_tensor_mode", is_input)
    with pytest.raises(GraphError, match=r"takes 'pixel_values', 'odd'; expected one image input$"):
        bench.open()
    assert bench.recorder.live() == {}


def test_an_engine_whose_image_size_is_dynamic_is_refused(bench) -> None:
    if bench.is_real:
        pytest.skip("the compiler here makes none")
    with pytest.raises(
        GraphError, match=r"'pixel_values' is FLOAT \[-1, 3, -1, 2\]; expected a pl"
    ):
        bench.open(Network(sizes=(3, -1, 2)))
    assert bench.recorder.live() == {}
