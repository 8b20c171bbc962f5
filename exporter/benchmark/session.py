"""What a benchmark holds while it runs: contenders open in their processes, and the pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msn_export.artifact import Feed, feed_of
from msn_export.benchmark.contenders import ContenderSpec, Origin, Placement, origin_of
from msn_export.benchmark.results import Contender, Rounds, figures, ratio_of, rotated
from msn_export.benchmark.worker import Process
from msn_export.engine_header import parse_header
from msn_export.errors import BenchError, DeviceError, MissingPackageError, RunnerError, SpecError
from msn_export.host import NoDriver, find_driver
from msn_export.models.named import AS_IT_SAYS, Choices
from msn_export.preprocessing import Exif
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.opening import VerifiedEngine, open_engine
from msn_export.runtime.runner import Runner
from msn_export.schema import from_plain, to_plain
from msn_export.spec import BatchRange, ImageSize, TensorSpec

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(slots=True)
class OpenContender:
    """A contender that is open in its process; ``told`` is what it says of itself."""

    entry: ContenderSpec
    process: Process
    told: dict[str, Any]
    record: Contender

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.entry.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What an artifact takes; PyTorch takes normalised planes and does not say."""
        return from_plain(tuple[TensorSpec, ...], self.told.get("inputs", []), "inputs")

    def splits(self, batch: int) -> str | None:
        """Say that a batch is not run at once, where it is not."""
        takes = BatchRange.parse(self.told["batch"]) if "batch" in self.told else None
        if takes is None or takes.min <= batch <= takes.max:
            return None
        return (
            f"{self.name} takes batches of {takes.min} to {takes.max}: {batch} is run in pieces "
            "or padded"
        )


@dataclass(slots=True)
class BenchSession:
    """Contenders in the order of the table, who is absent and why, and the pictures."""

    where: Placement
    folder: Path
    stack: ExitStack
    offline: bool
    choices: Choices = AS_IT_SAYS
    opened: list[OpenContender] = field(default_factory=list)
    absent: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    feed: Feed | None = None
    _started: int = 0

    def start(self, entry: ContenderSpec, tried: int | None = None) -> OpenContender:
        """Open an entry in a process of its own, and give it the pictures if they are there.

        Args:
            entry: what to open.
            tried: a batch size to run once: what torch.compile cannot do fails at its first call.
        """
        self._started += 1
        log = self.folder / f"{self._started}.log"
        process = Process(entry.name, log, self.where.threads, offline=self.offline)
        self.stack.enter_context(process)
        try:
            told = process.ask("open", **entry.opening)
            one = OpenContender(entry, process, told, self._record(entry, told))
            if self.feed is not None:
                self._give(one, self.feed)
            if tried is not None:
                self.outputs(one, tried)
        except BenchError:
            process.close()  # stopped, it would hold its memory until all are timed
            raise
        return one

    def beside(self, where: Placement, stack: ExitStack) -> BenchSession:
        """Give another arena with the same pictures and no contender yet."""
        return BenchSession(where, self.folder, stack, self.offline, feed=self.feed, _started=100)

    def agree(
        self, size: ImageSize | None, preprocess: str | None = None, exif: Exif | None = None
    ) -> Feed:
        """Find the one preprocessing that all artifacts share.

        Args:
            size: of the images, for graphs that leave it open; else that of the others.
            preprocess: a preset or JSON file, instead of what the manifests say.
            exif: instead of what the manifests say.
        """
        feeds: dict[str, Feed] = {}
        for one in sorted(self.opened, key=lambda one: one.entry.manifest is None):
            own = size
            if own is None and feeds and one.entry.manifest is None:
                own = next(iter(feeds.values())).preprocessing.size
            feeds[one.name] = feed_of(
                one.name,
                one.inputs,
                one.entry.manifest,
                preprocess=preprocess,
                exif=exif,
                size=own or one.entry.file,
            )
        sizes = {str(feed.preprocessing.size) for feed in feeds.values()}
        if len(sizes) > 1:
            raise SpecError(
                f"artifacts take images of {' and '.join(sorted(sizes))}; bench those of one size"
            )
        chosen = next(iter(feeds.values()))  # of the first that has a manifest, if any has
        self.notes += chosen.notes
        return chosen

    def show(self, feed: Feed, pixels: NDArray[np.uint8]) -> None:
        """Give everyone the pictures [count, h, w, c], and whoever comes later."""
        self.feed = feed
        np.save(self._pixels, pixels)
        for one in self.opened:
            self._give(one, feed)

    def outputs(self, one: OpenContender, batch: int) -> tuple[dict[str, NDArray[Any]], float]:
        """Begin a batch size; give the outputs for every picture, and the seconds it took."""
        path = self.folder / "outputs.npz"
        told = one.process.ask("begin", batch=batch, outputs=str(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}, float(told["seconds"])

    def origin(self, checkpoint: str | None) -> Origin:
        """Find the checkpoint of the artifacts, and what they put out of it."""
        assert self.feed is not None
        names: dict[str, None] = {}
        for one in self.opened:
            if "inputs" in one.told:
                names |= dict.fromkeys(spec["name"] for spec in one.told["outputs"])
        entries = [one.entry for one in self.opened]
        size = self.feed.preprocessing.size
        return origin_of(entries, checkpoint, tuple(names), size, self.choices)

    @property
    def _pixels(self) -> Path:
        return self.folder / "pixels.npy"

    def _give(self, one: OpenContender, feed: Feed) -> None:
        told = to_plain(feed.preprocessing)
        one.process.ask("take", pixels=str(self._pixels), preprocessing=told)

    def _record(self, entry: ContenderSpec, told: dict[str, Any]) -> Contender:
        specs = told.get("inputs", [])
        takes = "; ".join(f"{one['dtype']} [{', '.join(map(str, one['shape']))}]" for one in specs)
        on_gpu = self.where.device is not None
        return Contender(
            name=entry.name,
            kind=entry.kind,
            runs=told["runs"],
            file=str(entry.file) if entry.file is not None else None,
            sha256=entry.sha256,
            dtype=entry.dtype,
            takes=takes or f"{entry.dtype} planes",
            threads=self.where.threads,
            transfers=not self.where.resident if on_gpu else None,
            open_seconds=round(told["seconds"], 3),
        )


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
