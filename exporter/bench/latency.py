"""How long artifacts take for the same batch, by turns: engines on a GPU, graphs on the CPU."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from msn_export.bench.results import Rounds, figures, ratio_of, rotated
from msn_export.engine_header import parse_header
from msn_export.errors import DeviceError, MissingPackageError, RunnerError
from msn_export.host import NoDriver, find_driver
from msn_export.runtime.engine_opening import VerifiedEngine, open_engine
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.runner import Runner


@dataclass(frozen=True, slots=True)
class Effort:
    """How often each artifact is called."""

    rounds: int
    calls: int
    warm_up: int


# Enough that a median of rounds is steady to 1 % on an idle GPU; two seconds for a ViT-B.
ON_GPU = Effort(rounds=20, calls=10, warm_up=10)
# A ViT-B takes seconds a batch on a few cores; there the median is steady to some percent.
ON_CPU = Effort(rounds=5, calls=1, warm_up=1)


def time_engines(
    engines: Mapping[str, Path], images: NDArray[Any], baseline: str
) -> dict[str, Any]:
    """Time each engine's calls on ``images``, in rounds that begin with another engine each time.

    Copies to and from the GPU are in the times: they are the same for all.

    Returns:
        By name the median milliseconds of a call; with it ``batch``, ``device`` and, for those
        beside the baseline, ``ratio``: their time over the baseline's, the median of the rounds.
        Or ``reason``, why nothing was timed.
    """
    driver = find_driver()
    if isinstance(driver, NoDriver):
        return {"reason": driver.reason}
    try:
        return _timed(lambda path: open_engine(_staged(path)), engines, images, baseline, ON_GPU)
    except (DeviceError, MissingPackageError, RunnerError) as error:
        return {"reason": f"not timed: {error}"}


def time_graphs(graphs: Mapping[str, Path], images: NDArray[Any], baseline: str) -> dict[str, Any]:
    """Time each graph's calls in onnxruntime on the CPU; returns what ``time_engines`` does."""
    return _timed(OrtRunner, graphs, images, baseline, ON_CPU)


def _timed(
    open_: Callable[[Path], Runner],
    artifacts: Mapping[str, Path],
    images: NDArray[Any],
    baseline: str,
    effort: Effort,
) -> dict[str, Any]:
    with ExitStack() as stack:
        runners = {name: stack.enter_context(open_(path)) for name, path in artifacts.items()}
        rounds = _rounds(runners, images, effort)
        device = runners[baseline].name
    return {
        **{name: figures(times, len(images))["median_ms"] for name, times in rounds.items()},
        "ratio": {
            name: ratio_of(times, rounds[baseline]).median
            for name, times in rounds.items()
            if name != baseline
        },
        "batch": len(images),
        "device": device,
    }


def _staged(path: Path) -> VerifiedEngine:
    """Admit an engine that was compiled a moment ago and has no manifest yet."""
    content = path.read_bytes()
    return VerifiedEngine(path, content, parse_header(content, path), None)


def _rounds(
    runners: Mapping[str, Runner], images: NDArray[Any], effort: Effort
) -> dict[str, Rounds]:
    for runner in runners.values():
        for _ in range(effort.warm_up):
            runner(images)
    rounds: dict[str, Rounds] = {name: [] for name in runners}
    for turn in range(effort.rounds):
        for name in rotated(list(runners), turn):
            times = [_nanoseconds(runners[name], images) for _ in range(effort.calls)]
            rounds[name].append(times)
    return rounds


def _nanoseconds(runner: Runner, images: NDArray[Any]) -> int:
    start = time.perf_counter_ns()
    runner(images)
    return time.perf_counter_ns() - start
