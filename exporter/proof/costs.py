"""What a precision costs in each block: the reference in the candidate's precision, block by block.

The reference stands in for the candidate (``msn_export.baseline``) and is given the same streams;
the reference's own rounding is measured against fp64. Neither has a fault of the candidate in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export.baseline import narrow_like, write_like
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.emulate import in_fp64, widen
from msn_export.graph.fuse import attention_form
from msn_export.graph.precision import type_graph
from msn_export.graph.simplify import simplify
from msn_export.islands import MEASURED, decide
from msn_export.proof.artifact import Artifact
from msn_export.proof.pair import Pair
from msn_export.proof.streams import blocks_of, open_stream
from msn_export.quantise_like import quantise_like, rest_of
from msn_export.spec import BatchRange, Dtype, Head, InputKind

if TYPE_CHECKING:
    import onnx_ir as ir

    from msn_export.check.drift import Stream
    from msn_export.check.sample import Sample


@dataclass(frozen=True, slots=True)
class Costs:
    """What stands in for the candidate, and what says how the reference itself rounds.

    ``twin`` is None for a checkpoint, and where ``missing`` says why; ``stem`` is what it takes.
    ``how`` says what was done.
    """

    exact: Stream
    exact_stem: InputKind
    twin: Stream | None = None
    stem: InputKind = InputKind.FLOAT
    missing: str = ""
    how: str = ""

    def close(self) -> None:
        """Free both."""
        self.exact.close()
        if self.twin is not None:
            self.twin.close()


def open_costs(pair: Pair, sample: Sample, names: tuple[str, ...], given: tuple[str, ...]) -> Costs:
    """Put the reference into the candidate's precision, and into fp64.

    Args:
        pair: whose candidate's precision is asked about.
        sample: the pictures that fp32 islands are measured on.
        names: what both show.
        given: the stages that are given; none where the candidate runs by itself.
    """
    exact, stem = _open_exact(pair, sample, names, given)
    dtype = pair.candidate.dtype
    if pair.candidate.kind == "checkpoint":
        return Costs(exact, stem, how="what fp32 rounds away, measured against fp64")
    try:
        model = _in_precision(pair, sample)
    except GraphError as error:
        missing = f"what {dtype} costs could not be measured ({error})"
        return Costs(exact, stem, missing=missing)
    twin = blocks_of(model, names, given)
    how = f"what {dtype} costs there, measured on the reference put into {dtype}"
    if dtype is Dtype.FP32:
        how = "what fp32 rounds away there, measured on the reference as a graph and against fp64"
    return Costs(exact, stem, twin, _written(pair.candidate.stem), how=how)


def _open_exact(
    pair: Pair, sample: Sample, names: tuple[str, ...], given: tuple[str, ...]
) -> tuple[Stream, InputKind]:
    reference = pair.reference
    if reference.module is not None:
        return open_stream(reference, pair.outputs, names, exact=True), InputKind.FLOAT
    model = widen(_fp32_of(pair, sample))
    with contextlib.suppress(GraphError):  # of another exporter: the fp32 function has to do
        model = in_fp64(model)
    return blocks_of(model, names, given), _written(reference.stem)


def _written(stem: InputKind) -> InputKind:
    """Say what a graph that is written here takes in place of half precision planes."""
    return InputKind.FLOAT if stem is InputKind.HALF else stem


def _in_precision(pair: Pair, sample: Sample) -> ir.Model:
    """Type or quantise the reference's fp32 function as the candidate is.

    Raises:
        GraphError: the candidate is quantised in a way that cannot be repeated.
    """
    stem, dtype = _written(pair.candidate.stem), pair.candidate.dtype
    candidate = _graph_behind(pair.candidate)
    model = _fp32_of(pair, sample).clone()
    narrow_like(model, candidate)
    model = write_like(model, stem, sample.preprocessing, attention_form(candidate))
    rest = rest_of(candidate) if dtype.is_quantised else dtype
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        islands = decide(model, MEASURED, rest, sample, stem, Path(folder))
    if dtype.is_quantised:
        model = quantise_like(model, candidate, rest)
    if rest is not Dtype.FP32:
        named = {value.name for node in model.graph for value in node.outputs}
        type_graph(model, rest, islands.keys() & named)
    return model


def _fp32_of(pair: Pair, sample: Sample) -> ir.Model:
    reference = pair.reference
    if reference.module is None:
        return _graph_behind(reference)
    from msn_export.graph.trace import trace

    heads = [head for head in Head if head.output in pair.outputs]
    traced = trace(
        reference.module,
        heads=heads,
        stem=InputKind.FLOAT,
        batch=BatchRange(),
        preprocessing=sample.preprocessing,
    )
    return simplify(traced).model


def _graph_behind(artifact: Artifact) -> ir.Model:
    """Give an artifact's graph; an engine's is the one it was compiled from, beside it."""
    if artifact.graph is not None:
        return artifact.graph
    assert artifact.manifest is not None  # no engine is described without one
    assert artifact.manifest.source is not None  # or it could not have been built once more
    model = io.load(Path(artifact.name).parent / artifact.manifest.source.file)
    io.infer_shapes(model)
    return model
