"""The steps of ``msn-export drift``: block by block, where two artifacts part.

A TensorRT engine shows nothing but its outputs: it is built once more with its residual stream as
outputs. A tensor that is marked as one is not fused away, so this is not the engine in production:
the same graph, types, backend and profiles, but other kernels around the marked tensors.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.artifact import Artifact
from msn_export.commands.jobs import DriftJob, TrtJob
from msn_export.compare.drift import (
    Costs,
    Drift,
    Matched,
    inside_notes,
    match,
    open_costs,
    suspect_of,
)
from msn_export.compare.sides import Pair, open_pair, open_side
from msn_export.compare.streams import open_blocks, open_stream, what_is_shown
from msn_export.engine_header import read_header
from msn_export.errors import ImageError, ManifestError, ToleranceError
from msn_export.manifest import CheckRecord, Manifest, sha256_of
from msn_export.metrics.diagnose import (
    BRANCHES,
    Gathered,
    OwnError,
    TensorDrift,
    first_past,
    is_block,
    marks,
    own_errors,
    stages_of,
)
from msn_export.metrics.evaluate import Evaluation, Reference, Sample, batches, draw
from msn_export.metrics.tolerances import DRIFT, DRIFT_OF_ENGINES, GATES, coarsest
from msn_export.models.checkpoint import Choices
from msn_export.processor_config import choose
from msn_export.progress import SILENT, Progress
from msn_export.schema import to_plain
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from msn_export.metrics.diagnose import StreamLike, Tensors


__all__ = ["DriftJob", "run_drift"]  # the two that docs/python.md speaks of

# what a tensor may differ by between two batch sizes where no precision's cost was measured: two
# kernels of a size each add in another order
UNMEASURED = 1e-4
LARGEST_SECOND = 8  # pictures of the second batch: a graph that mixes its images does so in any


def run_drift(job: DriftJob, progress: Progress = SILENT) -> Drift:
    """Compare two artifacts block by block on the same pictures.

    Raises:
        MsnExportError: one cannot be read or run, or there are no pictures to compare them on.
    """
    return drift_of(job, progress, {})


def drift_of(job: DriftJob, progress: Progress, files: Mapping[str, Artifact]) -> Drift:
    """Compare two artifacts, those of ``files`` being open already."""
    choices = Choices(job.variant, job.weights, job.labels)
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        with progress.step("read both sides"):
            pair = open_pair(str(job.reference), str(job.candidate), choices, files)
        reference = _marked(pair.reference, Path(folder) / "reference", progress)
        candidate = _marked(pair.candidate, Path(folder) / "candidate", progress)
        return _compare(job, replace(pair, reference=reference, candidate=candidate), progress)


def _marked(side: Artifact, folder: Path, progress: Progress) -> Artifact:
    """Build an engine once more with its blocks shown; anything else shows them as it is."""
    if side.kind != "engine":
        return side
    assert side.manifest is not None  # no engine is described without one
    open_side(side, (), folder).close()  # what cannot run is refused before minutes of compiling

    folder.mkdir()
    shown = copy(side)
    shown.marked = Artifact.open(build_marked(side.path, side.manifest, folder, progress))
    return shown


def _compare(job: DriftJob, pair: Pair, progress: Progress) -> Drift:
    with progress.step("read images"):
        side = pair.reference
        preprocessing = choose(
            pair.preprocessing, side.size, side.channels, preprocess=job.preprocess, exif=job.exif
        )
        sample = draw(job.images, preprocessing, max_batch=pair.max_batch, limit=job.limit)
        _require_different(sample)
    matched = match(pair)
    look = _Look(job, pair, sample, matched)
    with progress.step("compare block by block"), look:
        look.compare()
        second = look.second_batch()
    own = look.own()
    names = matched.named(pair.outputs)
    reasons = {name: list(matched.reasons.get(name, ())) for name in names}
    for name, why in look.depends(second, own).items():
        reasons[name].append(why)
    reasons_of = {name: tuple(why) for name, why in reasons.items()}
    measured = stages_of(look.alone, look.peaks, own, reasons_of, names)
    parted = first_past(measured)
    suspect = suspect_of(measured, parted)
    inside: tuple[TensorDrift, ...] = ()
    if suspect in matched.stages and pair.reference.kind != "engine" != pair.candidate.kind:
        with progress.step(f"look into {suspect}"):
            inside = look.inside(suspect)
    dtype = coarsest(pair.reference.dtype, pair.candidate.dtype)
    return Drift(
        pair.reference.name,
        pair.candidate.name,
        dtype,
        measured,
        parted.name if parted else None,
        suspect,
        inside,
        look.check(dtype, second),
        look.how,
        tuple(
            dict.fromkeys((*pair.notes, *inside_notes(pair), *look.notes(second), *sample.notes))
        ),
    )


def _require_different(sample: Sample) -> None:
    """Refuse what shows no mixing of images, and no dependence on them."""
    count = len(sample)
    if count < 2 or (sample.pixels == sample.pixels[:1]).all():
        found = "holds one readable picture" if count < 2 else f"holds {count} pictures all alike"
        raise ImageError(
            f"{sample.source} {found}; drift needs two different ones, for it also looks for "
            "images that change each other's results"
        )


@dataclass(slots=True)
class _Look:
    """Both sides open, and what was measured of them so far."""

    job: DriftJob
    pair: Pair
    sample: Sample
    matched: Matched
    alone: Gathered = field(default_factory=Gathered)
    errors: Gathered = field(default_factory=Gathered)
    baseline: Gathered = field(default_factory=Gathered)
    rounding: Gathered = field(default_factory=Gathered)
    peaks: dict[str, tuple[float, str]] = field(default_factory=dict)
    ran_on: str = ""
    how: str = ""
    missing: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)
    _reference: Any = None
    _candidate: Any = None
    _blocks: Any = None
    _costs: Any = None

    @property
    def fed(self) -> bool:
        return self.pair.candidate.kind != "engine"

    @property
    def given(self) -> tuple[str, ...]:
        """The stages that are given: all that something matched reads."""
        stages = self.matched.stages
        return stages if self.matched.whole else stages[:-1]

    @property
    def compared(self) -> tuple[str, ...]:
        """The stages with an error of their own: those whose input both sides have."""
        outputs = self.pair.outputs if self.matched.whole else ()
        return (*self.matched.stages, *outputs)

    @property
    def batch(self) -> int:
        """The pictures run at a time; a side with a fixed batch sets it for both."""
        return self.fixed or min(self.job.batch, self.sample.max_batch)

    @property
    def fixed(self) -> int | None:
        return self.pair.reference.fixed_batch or self.pair.candidate.fixed_batch

    def __enter__(self) -> _Look:
        pair, stages = self.pair, self.matched.stages
        branches = tuple(f"{s} {branch}" for s in stages if is_block(s) for branch in BRANCHES)
        names = (*stages, *branches, *pair.outputs)
        given = self.given if self.fed else ()
        open_ = self._stack.enter_context
        self._reference = open_(
            closing(open_stream(pair.reference, pair.outputs, names, peaks=True))
        )
        self._candidate = open_(closing(open_stream(pair.candidate, pair.outputs, names)))
        if not stages:
            return self
        if self.fed:
            self._blocks = open_(closing(open_blocks(pair.candidate, pair.outputs, names, given)))
        self._costs = open_(closing(open_costs(pair, self.sample, names, given)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._reference = self._candidate = self._blocks = self._costs = None

    def compare(self) -> None:
        """Run everything over the sample once."""
        pair = self.pair
        self.ran_on = f"{self._reference.name} | {self._candidate.name}"
        for number, indices in enumerate(self._batches(self.batch)):
            want, have = self._run(self._reference, indices), self._run(self._candidate, indices)
            _require_alike(want, have, pair)
            self.alone.add(want, have, (*self.matched.stages, *pair.outputs))
            if not self.matched.stages:
                continue
            self._gather(
                self.errors, self._blocks, have, indices, want, pair.candidate.input_format
            )
            costs: Costs = self._costs
            self._gather(self.baseline, costs.baseline, None, indices, want, costs.input_format)
            if number == 0:
                self._gather(self.rounding, costs.exact, None, indices, want, costs.exact_format)
        self.peaks = dict(self._reference.peaks)
        self._describe()

    def _gather(
        self,
        into: Gathered,
        stream: StreamLike | None,
        shown: Tensors | None,
        indices: list[int],
        want: Tensors,
        input_format: Any,
    ) -> None:
        """Compare a stream's marks with the reference's."""
        stages = self.compared
        if stream is not None:
            given = {name: want[name] for name in self.given} if self.fed else None
            shown = stream(self.sample.preprocess(indices, input_format), given)
        if shown is not None:
            before = want if self.fed else shown
            ours, theirs = marks(want, stages, want), marks(shown, stages, before)
            for name, value in theirs.items():  # a cost is that of the tokens that are judged
                if into is not self.errors and name in self.errors:
                    first = self.errors[name].first_token
                    theirs[name] = value[:, :1] if first else value
            into.add(ours, theirs, ours)

    def _run(self, stream: StreamLike, indices: list[int]) -> Tensors:
        side = self.pair.reference if stream is self._reference else self.pair.candidate
        return stream(self.sample.preprocess(indices, side.input_format))

    def _batches(self, size: int) -> Iterator[list[int]]:
        for indices in batches([size], len(self.sample)):
            yield indices if self.fixed else [i for i in indices if i < len(self.sample)]

    def _describe(self) -> None:
        if not self.matched.stages:
            self.how = "the outputs alone were compared"
            return
        costs: Costs = self._costs
        self.missing = costs.missing
        what = (
            "each block of the candidate was given the reference's own stream"
            if self.fed
            else "an engine's blocks read its own stream, so what each adds to it was compared"
        )
        beside = (
            f"the limit is {self.job.tolerance:g} as asked for"
            if self.job.tolerance is not None
            else f"the limit is {self._times:g} times {costs.how}"
            if not costs.missing
            else f"the limit is {self._times:g} times the median of the other blocks, for "
            f"{costs.missing}"
        )
        self.how = f"{what}; {beside}"

    @property
    def _times(self) -> float:
        return DRIFT if self.fed else DRIFT_OF_ENGINES

    def own(self) -> dict[str, OwnError]:
        errors = self.errors.relative()
        costs: dict[str, float] | None = None
        if not self.missing:
            # two that round alike differ by the root of two
            costs = {name: 2**0.5 * error for name, error in self.rounding.relative().items()}
            for name, error in self.baseline.relative().items():
                costs[name] = float(np.maximum(error, costs.get(name, 0.0)))
        return own_errors(
            errors, costs, self.compared, times=self._times, tolerance=self.job.tolerance
        )

    def second_batch(self) -> _Second | None:
        """Run one batch of another size, drawn by seed, whose images ran in the first size too."""
        sizes = self._sizes()
        if not sizes:
            return None
        size = int(np.random.default_rng(self.job.seed).choice(sizes))
        found = _Second(size)
        indices = [index % len(self.sample) for index in range(size)]
        names = (*self.matched.stages, *self.pair.outputs)
        want = self._run(self._reference, indices)
        fed = self._blocks_at(indices, want) if self.matched.whole else None
        have = self._run(self._candidate, indices) if fed is None else {}
        for start in range(0, size, self.batch):
            part = indices[start : start + self.batch]
            rows = slice(start, start + len(part))
            given = {name: value[rows] for name, value in want.items()}
            if self.pair.reference.kind != "checkpoint":  # whose code knows of no other image
                found.reference.add(self._run(self._reference, part), given, names)
            if fed is None:
                cut = {name: value[rows] for name, value in have.items()}
                found.candidate.add(self._run(self._candidate, part), cut, names)
                continue
            apart = self._blocks_at(part, given)
            assert apart is not None  # as before
            ours = marks(apart, self.compared, given)
            cut = {name: value[rows] for name, value in fed.items()}
            found.candidate.add(ours, marks(cut, self.compared, given), ours)
        return found

    def _blocks_at(self, indices: list[int], want: Tensors) -> Tensors | None:
        if self._blocks is None:
            return None
        given = {name: want[name] for name in self.given}
        shown: Tensors = self._blocks(
            self.sample.preprocess(indices, self.pair.candidate.input_format), given
        )
        return shown

    def _sizes(self) -> list[int]:
        """List the sizes that both sides take but the first one."""
        if self.fixed:
            return []
        ranges = self.pair.reference.batch, self.pair.candidate.batch
        low, high = max(r.min for r in ranges), min(r.max for r in ranges)
        high = min(high, self.sample.max_batch, LARGEST_SECOND)
        return [size for size in range(low, high + 1) if size != self.batch]

    def depends(self, second: _Second | None, own: Mapping[str, OwnError]) -> dict[str, str]:
        """Name the first stage whose result for an image depends on the batch it is in."""
        if second is None:
            return {}
        sides = (
            (self.pair.candidate.name, second.candidate),
            (self.pair.reference.name, second.reference),
        )
        for side, gathered in sides:
            for name in (*self.compared, *self.pair.outputs):
                if name not in gathered:
                    continue
                moved = gathered[name].drift().relative
                if math.isnan(moved) and name in own and math.isnan(own[name].relative):
                    continue  # no number at any size
                if not moved <= self._may_move(name, own):
                    return {
                        name: f"an image's result depends on the batch it is in: {side} gives "
                        f"others by {moved:.1e} at batch {second.size} than at {self.batch}"
                    }
        return {}

    def _may_move(self, name: str, own: Mapping[str, OwnError]) -> float:
        """Give the most that a tensor may differ between two batch sizes."""
        stage = " ".join(name.split()[:2]) if is_block(name) else name
        if stage in own and math.isfinite(own[stage].allowed):
            return own[stage].allowed
        whole = self.alone[name].drift().relative if name in self.alone else 0.0
        return max(whole, UNMEASURED)

    def inside(self, block: str) -> tuple[TensorDrift, ...]:
        """Compare every tensor of one block that both sides have under some name."""
        pair = self.pair
        left, right = (
            what_is_shown(side).inside[block] for side in (pair.reference, pair.candidate)
        )
        theirs = {name for names in right for name in names}
        chosen = [next((name for name in names if name in theirs), None) for names in left]
        names = tuple(name for name in chosen if name is not None)
        before = self.matched.stages[self.matched.stages.index(block) - 1]
        gathered = Gathered()
        indices = next(self._batches(self.batch))
        with (
            closing(open_stream(pair.reference, pair.outputs, (*names, before))) as reference,
            closing(open_blocks(pair.candidate, pair.outputs, names, (before,))) as candidate,
        ):
            want = reference(self.sample.preprocess(indices, pair.reference.input_format))
            given = {before: want[before]}
            have = candidate(self.sample.preprocess(indices, pair.candidate.input_format), given)
            gathered.add(want, have, names)
        return tuple(comparison.drift() for comparison in gathered.values())

    def check(self, dtype: Dtype, second: _Second | None) -> CheckRecord:
        outputs = {name: self.alone[name].comparison.agreement() for name in self.pair.outputs}
        reference = Reference({}, self.sample, self.pair.reference.name)
        sizes = (self.batch,) if second is None else (self.batch, second.size)
        return Evaluation(outputs, sizes, self.ran_on, reference, GATES[dtype]).check

    def notes(self, second: _Second | None) -> Iterator[str]:
        """List what was chosen, and what was left out."""
        if second is not None:
            yield (
                f"batches of {self.batch}, and one of {second.size} (drawn by seed "
                f"{self.job.seed}) to see whether images change each other's results"
            )
        else:
            yield (
                f"batches of {self.batch} alone, which is all that one side takes: whether images "
                "change each other's results was not tried"
            )
        if not self.matched.whole:
            yield "blocks behind the first that does not match were not compared"


@dataclass(slots=True)
class _Second:
    """Each side at another batch size, compared with itself at the first."""

    size: int
    reference: Gathered = field(default_factory=Gathered)
    candidate: Gathered = field(default_factory=Gathered)


def _require_alike(want: Tensors, have: Tensors, pair: Pair) -> None:
    for name in pair.outputs:
        if want[name].shape != have[name].shape:
            sizes = ("x".join(map(str, tensors[name].shape)) for tensors in (have, want))
            raise ToleranceError(
                "output {!r} of {} is {} and the reference's {}; they must be the same".format(
                    name, pair.candidate.name, *sizes
                )
            )


def build_marked(engine: Path, manifest: Manifest, folder: Path, progress: Progress) -> Path:
    """Compile the graph an engine came from with the stages of its stream as outputs.

    The outputs are float32 and named ``seen:block 3``; those of the engine itself stay.
    """
    record, source = manifest.engine, manifest.source
    if record is None or source is None:
        raise ManifestError(f"the manifest of {engine} does not say which graph it came from")
    graph = engine.parent / source.file
    if not graph.is_file() or sha256_of(graph) != source.sha256:
        raise ManifestError(
            f"{engine} was built from {source.file} (sha256 {source.sha256[:12]}…), which is not "
            f"beside it; put it at {graph}, for drift builds it once more with its blocks shown"
        )
    targets = read_header(engine).targets
    islands = folder / "islands.json"
    measured = {name: peak for name, peak in manifest.islands.items() if peak is not None}
    islands.write_text(json.dumps(to_plain(measured)), encoding="utf-8")
    job = TrtJob(
        graph,
        output=folder / f"marked-{engine.name}",
        precision=manifest.dtype,
        backend=record.backend,
        # those asked for: none where it claims later GPUs too, or was built by full TensorRT,
        # whose header names none and which takes none
        capabilities=() if targets.later else targets.named,
        profiles=manifest.profiles,
        tf32=record.options.get("tf32") is True,
        hardware_compatible=record.options.get("hardware_compatible") is True,
        islands=str(islands) if measured else "none",
        bf16_attention=record.attention.bf16 if record.attention is not None else (),
        check=False,
        stages=True,
        force=True,
    )
    from msn_export.commands.trt import run_trt  # a compiler, which no other drift needs

    return run_trt(job, progress)[0]
