"""Two artifacts compared block by block: what the precision costs there, and where they part.

The reference stands in for the candidate (``msn_export.baseline``) and is given the same streams;
the reference's own rounding is measured against fp64. Neither has a fault of the candidate in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export.artifact import Artifact
from msn_export.baseline import narrow_like, quantise_like, rest_of, write_like
from msn_export.compare.sides import Pair, heads_of
from msn_export.compare.streams import Shown, blocks_of, open_stream, stream_of, what_is_shown
from msn_export.errors import GraphError
from msn_export.graph.blocks import ENTRY
from msn_export.graph.emulate import in_fp64, widen
from msn_export.graph.fuse import attention_form
from msn_export.graph.precision import type_graph
from msn_export.graph.simplify import simplify
from msn_export.graph.summary import differences_by_block, lost_epsilons
from msn_export.manifest import CheckRecord
from msn_export.metrics.diagnose import StageDrift, TensorDrift, is_block, most_of
from msn_export.mixed_precision import MEASURED, choose_fp32_islands
from msn_export.schema import Result
from msn_export.spec import BatchRange, Dtype, InputFormat

if TYPE_CHECKING:
    import onnx_ir as ir

    from msn_export.metrics.diagnose import StreamLike
    from msn_export.metrics.evaluate import Sample


@dataclass(frozen=True, slots=True, repr=False)
class Drift(Result):
    """Every stage compared; ``parted`` is the first that does not do what the reference's does.

    ``suspect`` is the block looked into: the one that parted, else the one whose own error is the
    most beside what its precision costs; ``inside`` are its tensors. ``how`` says what errors were
    measured, and beside what. ``check`` judges the outputs as ``validate`` does.
    """

    reference: str
    candidate: str
    dtype: Dtype
    stages: tuple[StageDrift, ...]
    parted: str | None
    suspect: str | None
    inside: tuple[TensorDrift, ...]
    check: CheckRecord
    how: str
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.parted is None

    @property
    def sentence(self) -> str:
        """The stage at which they part and why; if none, the block that errs the most."""
        for stage in self.stages:
            if stage.name == self.parted:
                why = "; ".join((*stage.reasons, *([] if _is_inside(stage) else [_error(stage)])))
                return f"They part at {stage.name}: {why}."
        most = most_of(self.stages)
        if most is None:
            return "No stage parts."
        return f"No stage parts; {most.name} errs the most: {_error(most)}."


def _is_inside(stage: StageDrift) -> bool:
    return stage.own is None or stage.own.inside


def _error(stage: StageDrift) -> str:
    """Describe a stage's own error, beside its cost and what is allowed."""
    own = stage.own
    assert own is not None  # asked of judged stages alone
    part = own.tensor.removeprefix(stage.name).strip()
    what = f"its own error is {own.relative:.1e}" + (f" in {part}" if part else "")
    if stage.tensor.nan or stage.tensor.inf:
        what += f", {stage.tensor.nan} NaN and {stage.tensor.inf} infinite values in it"
    if own.times is None:
        return f"{what}, {own.allowed:.1e} allowed"
    return f"{what}, {own.times:.2g} times its cost of {own.cost:.1e}, {own.allowed:.1e} allowed"


@dataclass(frozen=True, slots=True)
class Matched:
    """The stages that both sides have, as far as they match.

    ``stages`` end where the blocks are no longer the same; ``whole`` says that all are. ``reasons``
    say of each stage how it is another one.
    """

    stages: tuple[str, ...]
    reasons: Mapping[str, tuple[str, ...]]
    whole: bool

    def named(self, outputs: tuple[str, ...]) -> tuple[str, ...]:
        """List every stage there is something to say of, in order; outputs are the last."""
        return tuple(dict.fromkeys((*self.stages, *self.reasons, *outputs)))


def match(pair: Pair) -> Matched:
    """Match the blocks of both sides by number, and compare what the graphs say of each."""
    sides = pair.reference, pair.candidate
    shown: list[Shown] = []
    for side in sides:
        try:
            shown.append(what_is_shown(side))
        except GraphError as error:
            why = f"{side.name} has no blocks that can be found: {error}"
            return Matched((), {ENTRY: (why,)}, whole=False)
    reasons = _structure(pair)
    left, right = shown
    stages: list[str] = []
    for one, other in zip(left.stages, right.stages, strict=False):
        if one != other:
            break
        sizes = _other_sizes(left, right, one)
        if sizes:
            reasons[one] = (*reasons.get(one, ()), sizes)
            return _matched(stages, reasons)
        stages.append(one)
    numbers = set(left.stages) ^ set(right.stages)
    if numbers:
        first = min(numbers, key=_number)
        has, lacks = sides if first in left.stages else sides[::-1]
        count = {id(side): len(each.inside) for side, each in zip(sides, shown, strict=True)}
        why = (
            f"{lacks.name} has {count[id(lacks)]} blocks and no {first}, {has.name} has "
            f"{count[id(has)]} blocks"
        )
        reasons[first] = (*reasons.get(first, ()), why)
        return _matched(stages, reasons)
    return Matched(tuple(stages), reasons, whole=True)


def _matched(stages: list[str], reasons: dict[str, tuple[str, ...]]) -> Matched:
    """Keep of the reasons those of stages up to the first that does not match."""
    last = [name for name in reasons if name not in stages and (name == ENTRY or is_block(name))]
    ends = min(last, key=_number)
    kept = {
        name: why
        for name, why in reasons.items()
        if name in stages or _number(name) <= _number(ends)
    }
    return Matched(tuple(stages), dict(sorted(kept.items(), key=lambda i: _number(i[0]))), False)


def _structure(pair: Pair) -> dict[str, tuple[str, ...]]:
    """List contradictions by block; those behind the blocks are reasons of the first output."""
    found: dict[str, tuple[str, ...]] = {}
    differing = differences_by_block(pair.reference.structure, pair.candidate.structure)
    for where, why in differing.items():
        stage = where if is_block(where) else pair.outputs[0]
        found_there = why if is_block(where) else tuple(f"{line} in {where}" for line in why)
        found[stage] = (*found.get(stage, ()), *found_there)
    return dict(sorted(found.items(), key=lambda item: _number(item[0])))


def _number(stage: str) -> int:
    """Order stages: the entry, blocks, outputs."""
    return -1 if stage == ENTRY else int(stage.split()[1]) if is_block(stage) else 1 << 30


def _other_sizes(left: Shown, right: Shown, stage: str) -> str:
    """Describe a stage that has other sizes on either side; one token may stand for all."""
    want, have = left.stages[stage], right.stages[stage]
    if want is None or have is None:
        return ""
    pairs = list(zip(want, have, strict=False))
    alike = [one == other or None in {one, other} for one, other in pairs]
    if len(want) == len(have) == 2 and 1 in pairs[0]:
        alike[0] = True
    if len(want) == len(have) and all(alike):
        return ""
    shown = ("x".join("?" if size is None else str(size) for size in s) for s in (have, want))
    return "the stream is {}, the reference's {}".format(*shown)


def suspect_of(stages: tuple[StageDrift, ...], parted: StageDrift | None) -> str | None:
    """Choose the block to look into; an embedding or an output has no inside."""
    if parted is not None:
        return parted.name if is_block(parted.name) else None
    most = most_of(stages)
    return most.name if most is not None else None


def inside_notes(pair: Pair) -> tuple[str, ...]:
    """Warn of what differs inside the blocks and is right all the same."""
    smoothed = tuple(
        f"{side.name} was smoothed: some channels inside a block are scaled and scaled back, so "
        "tensors there differ by more than the block's output does"
        for side in (pair.reference, pair.candidate)
        if side.manifest is not None
        and side.manifest.quantization is not None
        and side.manifest.quantization.smoothing
    )
    return (*smoothed, *lost_epsilons(pair.reference.structure, pair.candidate.structure))


@dataclass(frozen=True, slots=True)
class Costs:
    """The baseline, and the reference in fp64, which shows how the reference itself rounds.

    ``baseline`` is None for a checkpoint, and where ``missing`` says why; ``input_format`` is what
    it takes. ``how`` says what was done.
    """

    exact: StreamLike
    exact_format: InputFormat
    baseline: StreamLike | None = None
    input_format: InputFormat = InputFormat.FLOAT
    missing: str = ""
    how: str = ""

    def close(self) -> None:
        self.exact.close()
        if self.baseline is not None:
            self.baseline.close()


def open_costs(pair: Pair, sample: Sample, names: tuple[str, ...], given: tuple[str, ...]) -> Costs:
    """Put the reference into the candidate's precision, and into fp64.

    Args:
        pair: whose candidate's precision is asked about.
        sample: the pictures that fp32 islands are measured on.
        names: what both show.
        given: the stages that are given; none where the candidate runs by itself.
    """
    exact, input_format = _open_exact(pair, sample, names, given)
    dtype = pair.candidate.dtype
    if pair.candidate.kind == "checkpoint":
        return Costs(exact, input_format, how="what fp32 rounds away, measured against fp64")
    try:
        model = _in_precision(pair, sample)
    except GraphError as error:
        missing = f"what {dtype} costs could not be measured ({error})"
        return Costs(exact, input_format, missing=missing)
    baseline = blocks_of(model, stream_of(model), names, given)
    how = f"what {dtype} costs there, measured on the reference put into {dtype}"
    if dtype is Dtype.FP32:
        how = "what fp32 rounds away there, measured on the reference as a graph and against fp64"
    return Costs(exact, input_format, baseline, _written(pair.candidate.input_format), how=how)


def _open_exact(
    pair: Pair, sample: Sample, names: tuple[str, ...], given: tuple[str, ...]
) -> tuple[StreamLike, InputFormat]:
    reference = pair.reference
    if reference.module is not None:
        return open_stream(reference, pair.outputs, names, exact=True), InputFormat.FLOAT
    model = widen(_fp32_of(pair, sample))
    with contextlib.suppress(GraphError):  # of another exporter: the fp32 function has to do
        model = in_fp64(model)
    return blocks_of(model, stream_of(model), names, given), _written(reference.input_format)


def _written(input_format: InputFormat) -> InputFormat:
    """Give the input of a graph that is written here in place of half precision planes."""
    return InputFormat.FLOAT if input_format is InputFormat.HALF else input_format


def _in_precision(pair: Pair, sample: Sample) -> ir.Model:
    """Type or quantise the reference's fp32 function as the candidate is."""
    input_format, dtype = _written(pair.candidate.input_format), pair.candidate.dtype
    behind = _graph_behind(pair.candidate)
    candidate = behind.graph
    assert candidate is not None  # it is an ONNX file
    model = _fp32_of(pair, sample).clone()
    narrow_like(model, behind.stream)
    model = write_like(model, input_format, sample.preprocessing, attention_form(candidate))
    rest = rest_of(candidate) if dtype.is_quantised else dtype
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        islands = choose_fp32_islands(model, MEASURED, rest, sample, input_format, Path(folder))
    if dtype.is_quantised:
        model = quantise_like(model, candidate, rest)
    if rest is not Dtype.FP32:
        named = {value.name for node in model.graph for value in node.outputs}
        type_graph(model, rest, islands.keys() & named)
    return model


def _fp32_of(pair: Pair, sample: Sample) -> ir.Model:
    reference = pair.reference
    if reference.module is None:
        model = _graph_behind(reference).graph
        assert model is not None  # it is an ONNX file
        return model
    from msn_export.graph.torch_reference import trace

    traced = trace(
        reference.module,
        heads=heads_of(pair.outputs),
        input_format=InputFormat.FLOAT,
        batch=BatchRange(),
        preprocessing=sample.preprocessing,
    )
    return simplify(traced)[0]


def _graph_behind(artifact: Artifact) -> Artifact:
    """Give an ONNX file as it is; of an engine the one it was compiled from, beside it."""
    if artifact.kind == "onnx":
        return artifact
    assert artifact.manifest is not None  # no engine is described without one
    assert artifact.manifest.source is not None  # or it could not have been built once more
    return Artifact.open(artifact.path.parent / artifact.manifest.source.file, is_graph=True)
