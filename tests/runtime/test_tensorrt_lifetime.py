"""However a runner ends, it gives everything back, with the GPU current."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export.errors import DeviceError, RunnerError
from msn_export.runtime.cuda import Gpu
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import BENCHES, ROWS, Bench, make_bench

ROOT = Path(__file__).parent.parent.parent
NETWORK = Network()


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = make_bench(request.param, monkeypatch)
    yield made
    made.recorder.live()
    assert made.problems() == []


def used(bench: Bench) -> Any:
    """Open a runner and run it on the host and on the GPU, often enough to capture."""
    library, runner = bench.library(), bench.open()
    for _ in range(3):
        runner(NETWORK.images(3))
        library.to_host(runner(library.to_gpu(NETWORK.images(3))).embedding)
    return runner


def live(bench: Bench) -> dict[str, int]:
    bench.settle()
    return bench.recorder.live()


def test_a_runner_that_is_dropped_gives_everything_back(bench) -> None:
    runner = used(bench)
    assert live(bench)["engine"] == 1
    del runner
    assert live(bench) == {}


def test_so_does_one_that_the_garbage_collector_finds(bench) -> None:
    runner = used(bench)
    runner.cycle = runner
    del runner
    gc.collect()
    assert live(bench) == {}


def test_one_that_never_ran_too(bench) -> None:
    bench.open()
    assert live(bench) == {}


def test_an_output_outlives_a_runner_that_is_dropped(bench) -> None:
    library, runner = bench.library(), bench.open()
    images = NETWORK.images(3)
    output = runner(library.to_gpu(images)).embedding
    del runner
    assert set(live(bench)) == {"cuMemAlloc", "cuEventCreate"}
    copied = library.copy(output)
    del output
    wanted = compute(NETWORK, images)["embedding"]
    np.testing.assert_array_equal(library.to_host(copied), wanted)
    assert live(bench) == {}


def test_a_runner_dropped_while_cuda_fails_raises_nothing_and_frees_the_rest(bench) -> None:
    runner = used(bench)
    bench.recorder.calls.clear()
    bench.recorder.fail_at = 1  # behind what makes the GPU current
    del runner
    gc.collect()
    bench.recorder.fail_at = None
    assert live(bench) == {}


def test_the_primary_context_is_retained_once_and_never_released(bench) -> None:
    for _ in range(3):
        with bench.open() as runner:
            runner(NETWORK.images(2))
    bench.open()
    assert bench.recorder.retained == 1
    assert bench.recorder.count("cuDevicePrimaryCtxRelease") == 0


def test_one_that_cannot_be_retained_is_tried_again(bench) -> None:
    bench.recorder.fail_at = 2  # behind cuInit and cuDeviceGet
    with pytest.raises(DeviceError, match="cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEM"):
        bench.open()
    bench.recorder.fail_at = None
    with bench.open() as runner:
        runner(NETWORK.images(1))
    assert bench.recorder.retained == 1


def test_a_runner_that_goes_while_a_graph_is_captured_waits_for_that(bench) -> None:
    gone, runner = used(bench), bench.open()
    capture = Gpu.capture
    kept = [gone]
    del gone

    def dropping(gpu: Gpu, stream: Any, enqueue: Any) -> Any:
        def enqueue_and_drop() -> None:
            enqueue()
            kept.clear()
            assert bench.recorder.live()["engine"] == 2  # CUDA frees nothing now

        return capture(gpu, stream, enqueue_and_drop)

    with pytest.MonkeyPatch.context() as patch, runner:
        patch.setattr(Gpu, "capture", dropping)
        for _ in range(3):
            runner(NETWORK.images(2))
        if bench.captures:
            assert kept == []
            assert runner.cuda_graphs == "1 captured"
            assert bench.recorder.live()["engine"] == 1
    kept.clear()
    assert live(bench) == {}


def test_two_threads_may_close_a_runner(bench) -> None:
    runner = used(bench)
    threads = [threading.Thread(target=runner.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live(bench) == {}
    with pytest.raises(RunnerError, match="is closed; open another"):
        runner(NETWORK.images(1))


EXIT = """
import atexit, os
atexit.register(lambda: print(*(f"{one.recorder.live()} {one.problems()}" for one in benches)))
from tests.builders.networks import Network
from tests.builders.trt_bench import ROWS, Bench
from tests.fakes.tensors_stand_in import NAME
from msn_export.runtime import dlpack

def used(bench):
    dlpack.CURRENT_STREAM[NAME] = bench.current_stream
    runner, images = bench.open(), Network().images(3)
    for _ in range(3):
        runner(images)
        output = runner(bench.library().to_gpu(images)).embedding
    return runner, output

benches = [*map(Bench, ROWS), Bench("strategy")]
runners = [used(bench)[0] for bench in benches[:-1]]
kept = used(benches[-1])

calls = [len(bench.recorder.calls) for bench in benches]
if os.fork() == 0:
    runners.clear()
    kept[0].close()
    same = calls == [len(bench.recorder.calls) for bench in benches]
    print(same, [bench.recorder.live()["engine"] for bench in benches], flush=True)
    os._exit(0)
os.wait()
"""


def test_when_the_process_ends_all_goes_but_outputs_and_a_fork_touches_nothing(tmp_path) -> None:
    # Python 3.12 and later warn of any fork beside threads
    quiet = ("-W", "ignore:This process:DeprecationWarning")
    run = subprocess.run(
        [sys.executable, *quiet, "-c", EXIT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    forked, ended = run.stdout.splitlines()
    assert forked == f"True {[1] * (len(ROWS) + 1)}"
    assert ended == "{} [] " * len(ROWS) + "{'cuMemAlloc': 1, 'cuEventCreate': 1} []"
