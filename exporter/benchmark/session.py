"""A benchmark while it runs: contenders open in their processes, the pictures, the reference.

``time_engines`` and ``time_graphs`` time files in this process instead: figures of a few calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.benchmark.contenders import Origin, Placement, origin_of, torch_entry
from msn_export.benchmark.results import (
    Agreed,
    Contender,
    figures,
    noise_of,
    ratio_of,
    rotated,
)
from msn_export.engine_header import parse_header
from msn_export.errors import (
    BenchError,
    DeviceError,
    MissingPackageError,
    RunnerError,
    SpecError,
    ToleranceError,
)
from msn_export.feed import Feed, feed_of
from msn_export.host import ChildProcess, NoDriver, find_driver, last_line, signal_name
from msn_export.metrics.metrics import Comparison, worst_of
from msn_export.models.checkpoint import AS_IT_SAYS, Choices
from msn_export.runtime.engine import VerifiedEngine
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.opening import open_engine
from msn_export.schema import from_plain, to_plain
from msn_export.spec import BatchRange, Dtype, ImageSize, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from msn_export.benchmark.contenders import ContenderSpec
    from msn_export.benchmark.results import Rounds
    from msn_export.preprocessing import Exif
    from msn_export.runtime.runner import Runner

CONTENDER = "msn_export.benchmark.worker"
_ENDING = 10  # seconds a process that closed its pipe may take to end
# Each library of linear algebra reads a name of its own
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ContenderProcess(ChildProcess):
    """A process that runs ``worker`` and answers one request at a time.

    ``log`` receives all that it prints; ``offline`` it fetches nothing from the hub.
    """

    def __init__(self, name: str, log: Path, threads: int, *, offline: bool) -> None:
        self.name, self._log = name, log
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        with log.open("wb") as file:
            super().__init__(CONTENDER, file, environment)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, let the process run until it has answered, and stop it again.

        A thread pool that waits for work spins: it would take the next contender's cores.
        """
        self.process.send_signal(signal.SIGCONT)
        try:
            self.send({"request": request, **arguments})
            line = self.messages.readline()
        finally:
            self.process.send_signal(signal.SIGSTOP)
        if not line:
            raise BenchError(f"{self.name}: {self._end()}")
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            raise BenchError(f"{self.name}: {message['failed']}")
        reply: dict[str, Any] = message["done"]
        return reply

    def _end(self) -> str:
        # it was stopped, maybe while it was ending: what it does not end by itself is ended
        self.process.send_signal(signal.SIGCONT)
        try:
            code = self.process.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"its process answered nothing more and did not end in {_ENDING} s"
        with self._log.open("rb") as file:
            line = last_line(file)
        last = f"; its last line: {line}" if line else ""
        if code == -signal.SIGKILL:
            return f"its process was killed, most likely because memory ran out{last}"
        if code < 0:
            return f"its process crashed ({signal_name(code)}){last}"
        return f"its process ended (exit {code}){last}"


@dataclass(slots=True)
class OpenContender:
    """A contender that is open in its process; ``reply`` is what that answered when it opened it.

    An artifact's reply has its ``inputs`` and ``batch``; PyTorch's has neither.
    """

    entry: ContenderSpec
    process: ContenderProcess
    reply: dict[str, Any]
    record: Contender

    @property
    def name(self) -> str:
        return self.entry.name

    def splits(self, batch: int) -> str | None:
        """Describe how a batch is run that the artifact does not take at once."""
        takes = BatchRange.parse(self.reply["batch"]) if "batch" in self.reply else None
        if takes is None or takes.min <= batch <= takes.max:
            return None
        if batch < takes.min:
            return f"padded to {takes.min}"
        return f"in pieces of {takes.max}"


@dataclass(slots=True)
class BenchSession:
    """Contenders in the order of the table, who is absent and why, and the pictures."""

    placement: Placement
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
        process = ContenderProcess(entry.name, log, self.placement.threads, offline=self.offline)
        self.stack.enter_context(process)
        try:
            reply = process.ask("open", **entry.opening)
            one = OpenContender(entry, process, reply, self._record(entry, reply))
            if self.feed is not None:
                self._set_images(one, self.feed)
            if tried is not None:
                self.outputs(one, tried)
        except BenchError:
            process.close()  # stopped, it would hold its memory until all are timed
            raise
        return one

    def beside(self, placement: Placement, stack: ExitStack) -> BenchSession:
        """Begin another session with the same pictures and no contender yet."""
        return BenchSession(
            placement, self.folder, stack, self.offline, feed=self.feed, _started=100
        )

    def agree(
        self, size: ImageSize | None, preprocess: str | None = None, exif: Exif | None = None
    ) -> Feed:
        """Find the one preprocessing that all artifacts share.

        ``size`` is for graphs that leave it open, which else take that of the others;
        ``preprocess`` and ``exif`` stand instead of what the manifests say.
        """
        feeds: dict[str, Feed] = {}
        for one in sorted(self.opened, key=lambda one: one.entry.stated is None):
            own = size
            if own is None and feeds and one.entry.stated is None:
                own = next(iter(feeds.values())).preprocessing.size
            feeds[one.name] = feed_of(
                one.name,
                from_plain(tuple[TensorSpec, ...], one.reply["inputs"], "inputs"),
                one.entry.stated,
                preprocess=preprocess,
                exif=exif,
                size=own or one.entry.file,
            )
        sizes = {str(feed.preprocessing.size) for feed in feeds.values()}
        if len(sizes) > 1:
            raise SpecError(
                f"artifacts take images of {' and '.join(sorted(sizes))}; bench those of one size"
            )
        chosen = next(iter(feeds.values()))  # of the first that says something, if any does
        self.notes += chosen.notes
        return chosen

    def set_images(self, feed: Feed, pixels: NDArray[np.uint8]) -> None:
        """Give every contender the pictures [count, h, w, c], and each that is opened later."""
        self.feed = feed
        np.save(self._pixels, pixels)
        for one in self.opened:
            self._set_images(one, feed)

    def outputs(self, one: OpenContender, batch: int) -> tuple[dict[str, NDArray[Any]], float]:
        """Begin a batch size; give the outputs for every picture, and the seconds it took."""
        path = self.folder / "outputs.npz"
        reply = one.process.ask("warm_up", batch=batch, outputs=str(path))
        with np.load(path, allow_pickle=False) as file:
            return dict(file), float(reply["seconds"])

    def origin(self, checkpoint: str | None) -> Origin:
        assert self.feed is not None
        names: dict[str, None] = {}
        for one in self.opened:
            if "inputs" in one.reply:
                names |= dict.fromkeys(spec["name"] for spec in one.reply["outputs"])
        entries = [one.entry for one in self.opened]
        size = self.feed.preprocessing.size
        return origin_of(entries, checkpoint, tuple(names), size, self.choices, self.folder)

    @property
    def _pixels(self) -> Path:
        return self.folder / "pixels.npy"

    def _set_images(self, one: OpenContender, feed: Feed) -> None:
        preprocessing = to_plain(feed.preprocessing)
        one.process.ask("set_images", pixels=str(self._pixels), preprocessing=preprocessing)

    def _record(self, entry: ContenderSpec, reply: dict[str, Any]) -> Contender:
        specs = reply.get("inputs", [])
        takes = "; ".join(f"{one['dtype']} [{', '.join(map(str, one['shape']))}]" for one in specs)
        on_gpu = self.placement.device is not None
        return Contender(
            name=entry.name,
            kind=entry.kind,
            runs=reply["runs"],
            file=str(entry.file) if entry.file is not None else None,
            sha256=entry.sha256,
            dtype=entry.dtype,
            takes=takes or f"{entry.dtype} planes",
            threads=self.placement.threads,
            transfers=not self.placement.resident if on_gpu else None,
            open_seconds=round(reply["seconds"], 3),
            precision=reply.get("precision") or None,
        )


_BATCH = 4  # images the reference takes at a time: it is not what is timed


@dataclass(frozen=True, slots=True)
class BenchReference:
    """Outputs [count, ...] by name; ``checkpoint`` is the sha256 of their weights, if any is known.

    ``name`` says what made them, or why there are none.
    """

    name: str
    outputs: Mapping[str, NDArray[Any]]
    checkpoint: str | None = None

    def compare(
        self, entry: ContenderSpec, outputs: Mapping[str, NDArray[Any]]
    ) -> tuple[Agreed | None, str | None]:
        """Compare every output that both have; or give the reason why none was."""
        if not self.outputs:
            return None, self.name
        own = entry.checkpoint.sha256 if entry.checkpoint is not None else None
        if own is not None and self.checkpoint is not None and own != self.checkpoint:
            return None, "it was made from another checkpoint than the reference"
        shared = [name for name in self.outputs if name in outputs]
        if not shared:
            return None, f"it has no output in common with the reference ({self.name})"
        agreements = []
        for name in shared:
            comparison = Comparison()
            try:
                comparison.add(self.outputs[name], outputs[name])
            except ToleranceError as error:
                return None, f"{name}: {error}"
            agreements.append(comparison.agreement())
        worst = worst_of(agreements)
        return Agreed(**{name: getattr(worst, name) for name in Agreed.__slots__}), None


def find_reference(session: BenchSession, checkpoint: str | None) -> BenchReference:
    """Run the PyTorch model in fp32 on the CPU; its process is gone before anything is timed.

    Where it cannot be had, the first fp32 graph stands in, and says so.
    """
    with ExitStack() as stack:
        try:
            origin = session.origin(checkpoint)
            cpu = Placement(session.placement.threads)
            apart = session.beside(cpu, stack)
            one = apart.start(torch_entry("sdpa", origin, cpu, Dtype.FP32))
            outputs, _ = apart.outputs(one, _BATCH)
        except BenchError as error:
            return _first_fp32(session, str(error).removeprefix("sdpa: "))
    return BenchReference(f"{origin.checkpoint}, {one.record.runs}, fp32", outputs, origin.sha256)


def _first_fp32(session: BenchSession, reason: str) -> BenchReference:
    for one in session.opened:
        if one.entry.dtype == Dtype.FP32 and one.entry.kind == "onnx":
            record = one.entry.checkpoint
            outputs, _ = session.outputs(one, _BATCH)
            name = f"{one.name} (no PyTorch reference: {reason})"
            return BenchReference(name, outputs, record.sha256 if record is not None else None)
    return BenchReference(f"nothing ({reason})", {})


@dataclass(frozen=True, slots=True)
class Effort:
    """Numbers of rounds and of calls of each artifact."""

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
        By name the median milliseconds of a call; with it ``batch``, ``device``, ``rounds`` and,
        for those beside the baseline, ``ratio``: their time over the baseline's, the median of the
        rounds, ``quartiles`` of it, and ``noisy``, why it cannot be used, or None. Or ``reason``,
        why nothing was timed.
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
    ratios = {
        name: ratio_of(times, rounds[baseline])
        for name, times in rounds.items()
        if name != baseline
    }
    reasons = (noise_of(ratio, rounds[name], alone=False) for name, ratio in ratios.items())
    return {
        **{name: figures(times, len(images))["median_ms"] for name, times in rounds.items()},
        "ratio": {name: ratio.median for name, ratio in ratios.items()},
        "quartiles": {name: [ratio.q1, ratio.q3] for name, ratio in ratios.items()},
        "rounds": effort.rounds,
        "noisy": next(filter(None, reasons), None),
        "batch": len(images),
        "device": device,
    }


def _staged(path: Path) -> VerifiedEngine:
    """Take an engine that was compiled a moment ago and has no manifest yet."""
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
            times = []
            for _ in range(effort.calls):
                start = time.perf_counter_ns()
                runners[name](images)
                times.append(time.perf_counter_ns() - start)
            rounds[name].append(times)
    return rounds
