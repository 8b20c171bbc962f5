"""What quantising a graph costs and what it saves, on images it was not calibrated on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from msn_export.check.gate import Gate
from msn_export.check.verify import Reference, Runner, verify
from msn_export.manifest_records import CheckRecord
from msn_export.quantise.choices import EVERYTHING, Choice
from msn_export.spec import Head, InputKind

# Saving less than this of the twin's bytes is not worth another artifact.
WORTHWHILE = 0.10


@dataclass(frozen=True, slots=True)
class Judged:
    """How a graph agrees with the fp32 graph on held-out images; shares from 0 to 1, None unknown.

    ``failures`` says what its gate asks and it does not reach.
    """

    record: CheckRecord
    failures: tuple[str, ...]
    neighbours: float | None
    classes: float | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A graph written to a staging path, how it was judged, and which blocks it keeps."""

    path: Path
    model: ir.Model
    judged: Judged
    choice: Choice = EVERYTHING


def judge(
    runner: Runner, reference: Reference, gate: Gate, stem: InputKind, fixed: int | None
) -> Judged:
    """Run a candidate over the reference's images and compare.

    Raises:
        ToleranceError: it has other outputs.
    """
    size = fixed or min(8, reference.sample.room, len(reference.sample))
    verified = verify(runner, reference, stem, (size,))
    failures = verified.failures(gate)
    return Judged(
        verified.record(gate, passed=not failures),
        tuple(failures),
        _least(
            agreement.neighbours
            for name, agreement in verified.outputs.items()
            if name != Head.LOGITS.output
        ),
        _least(agreement.classes for agreement in verified.outputs.values()),
    )


def _least(shares: Iterable[float | None]) -> float | None:
    """Give the share of the output that agrees least."""
    return min((share for share in shares if share is not None), default=None)


@dataclass(frozen=True, slots=True)
class Savings:
    """What the twin in ``base`` takes, and the graph in ``form`` after it.

    Sizes are bytes of the files and, where they were compiled, of the engines. ``latency`` is in
    milliseconds a batch, or the reason why nothing was timed. ``faults`` are what the compiled
    engine should be and is not.
    """

    base: str
    form: str
    file: tuple[int, int]
    engine: tuple[int, int] | None
    latency: tuple[float, float] | str
    faults: tuple[str, ...] = ()

    @property
    def size_share(self) -> float:
        """What of the twin's bytes is left, in the engine where it is known."""
        twin, quantised = self.engine or self.file
        return quantised / twin

    @property
    def worthwhile(self) -> bool:
        """Whether anything is gained: bytes, and no time lost where that was measured.

        A kernel that was taken apart, or multiplies in another type, loses time on any GPU.
        """
        faster = isinstance(self.latency, str) or self.latency[1] < self.latency[0]
        return self.size_share <= 1 - WORTHWHILE and faster and not self.faults


def sentence(savings: Savings, judged: Judged, twin: Judged, *, kept: int, depth: int) -> str:
    """Say in one sentence what quantising costs, saves, and whether to."""
    what = "engine" if savings.engine else "file"
    share = savings.size_share
    change = f"{1 - share:.0%} smaller" if share <= 1 else f"{share - 1:.0%} larger"
    saved = f"the {savings.form} {what} is {change} than the {savings.base} one"
    cost = "; ".join(
        f"{what} {_figure(getattr(judged.record, name), form)} "
        f"({savings.base}: {_figure(getattr(twin.record, name), form)})"
        for what, name, form in (
            ("relative error", "relative", ".2%"),
            ("p1 cosine", "cosine_p1", ".5f"),
        )
    )
    shares = [
        f"{share:.0%} of {named} agree"
        for share, named in ((judged.neighbours, "neighbours"), (judged.classes, "classes"))
        if share is not None
    ]
    if kept:
        shares.append(f"{kept} of {depth} blocks kept in {savings.base}")
    detail = "; ".join([cost, *shares, *savings.faults, _time(savings)])
    if not savings.worthwhile:
        return f"keep {savings.base}: {saved}; {detail}"
    return f"{saved}; {detail}"


def _time(savings: Savings) -> str:
    if isinstance(savings.latency, str):
        return f"time not measured: {savings.latency}"
    before, after = savings.latency
    return f"{after:.2f} ms a batch ({savings.base}: {before:.2f})"


def _figure(value: float | None, form: str) -> str:
    return "none" if value is None else f"{value:{form}}"
