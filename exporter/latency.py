"""How long two engines take for the same batch, by turns, where there is a GPU to run them."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from msn_export.bench.figures import Rounds, figures, ratio_of, rotated
from msn_export.driver import NoDriver, find_driver
from msn_export.engine_header import parse_header
from msn_export.errors import DeviceError, MissingPackageError, RunnerError
from msn_export.runtime.admission import Admitted
from msn_export.runtime.engine_opening import open_engine
from msn_export.runtime.runner import Runner

# Enough that a median of rounds is steady to 1 % on an idle GPU; two seconds for a ViT-B.
ROUNDS, CALLS, WARM_UP = 20, 10, 10


def time_beside(engines: Mapping[str, Path], images: NDArray[Any], baseline: str) -> dict[str, Any]:
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
        with ExitStack() as stack:
            runners = {
                name: stack.enter_context(open_engine(_staged(path)))
                for name, path in engines.items()
            }
            rounds = _rounds(runners, images)
            device = runners[baseline].name
    except (DeviceError, MissingPackageError, RunnerError) as error:
        return {"reason": f"not timed: {error}"}
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


def _staged(path: Path) -> Admitted:
    """Admit an engine that was compiled a moment ago and has no manifest yet."""
    content = path.read_bytes()
    return Admitted(path, content, parse_header(content, path), None)


def _rounds(runners: Mapping[str, Runner], images: NDArray[Any]) -> dict[str, Rounds]:
    for runner in runners.values():
        for _ in range(WARM_UP):
            runner(images)
    rounds: dict[str, Rounds] = {name: [] for name in runners}
    for turn in range(ROUNDS):
        for name in rotated(list(runners), turn):
            rounds[name].append([_nanoseconds(runners[name], images) for _ in range(CALLS)])
    return rounds


def _nanoseconds(runner: Runner, images: NDArray[Any]) -> int:
    start = time.perf_counter_ns()
    runner(images)
    return time.perf_counter_ns() - start
