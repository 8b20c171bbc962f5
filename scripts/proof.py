"""Plant faults of every kind and size, and write into docs/proof.md which are caught.

    python scripts/proof.py --seed 20261129 --minutes 20

Each kind of tests/contracts/fault_kinds.py is drawn by the seed in graphs of two checkpoints, in each
precision, and made as large as to move the outputs by 0.5, 1, 2, 4 and 16 times what the precision
itself does. All of them take hours; ``--minutes`` bounds it, and the page says how many there were.
"""

import argparse
import datetime
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.pyplot as plt
import numpy as np
import photographs
import torch
from pages import replace_part

from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.drift import DriftJob, run_drift
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.spec import Dtype, InputFormat, Observer, Target
from tests.builders import digits
from tests.contracts import fault_table
from tests.contracts.fault_kinds import Fault
from tests.contracts.fault_table import BATCH, Candidate, Row, Subject

PROOF, CURVE = Path("docs/proof.md"), Path("docs/images/proof.svg")
WANTED = (0.5, 1.0, 2.0, 4.0, 16.0)
EDGES = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 16.0, float("inf"))
DTYPES = (Dtype.FP32, Dtype.FP16, Dtype.BF16, Dtype.INT8)
LEAST = 2.0  # the effect from which on a fault has to be caught


@dataclass(frozen=True)
class Planted:
    """A fault of an effect, whether ``validate`` caught it, and where ``drift`` says it is.

    ``found`` is None where ``drift`` was not asked.
    """

    row: Row
    found: str | None = None

    @property
    def is_caught(self) -> bool:
        """Whether ``validate`` failed."""
        return not self.row.validation.passed

    @property
    def is_located(self) -> bool:
        """Whether ``drift`` names the stage where it was planted."""
        return self.found == self.row.fault.stage


def planted(candidates: list[Candidate], seed: int, minutes: float) -> tuple[list[Planted], int]:
    """Plant all kinds and effects, in an order drawn by the seed, until the time is over.

    Returns:
        What was planted, and how many there are.
    """
    every = [(c, fault, w) for c in candidates for fault in c.drawn(seed) for w in WANTED]
    ends, found = time.monotonic() + 60 * minutes, []
    for index in np.random.default_rng(seed).permutation(len(every)).tolist():
        if time.monotonic() > ends:
            break
        found.append(_plant(*every[index]))
    return found, len(every)


def _plant(candidate: Candidate, fault: Fault, wanted: float) -> Planted:
    row = candidate.row(fault, wanted)
    parted = None
    if row.effect >= LEAST:
        job = DriftJob(
            str(candidate.subject.reference(candidate.dtype)), str(row.path),
            images=candidate.subject.checked, limit=8,
        )  # fmt: skip
        parted = run_drift(job).parted or "nowhere"
    print(row, "" if parted is None else f"({parted})", flush=True)
    return Planted(row, parted)


def clean(subject: Subject, dtype: Dtype, stage: Path) -> Iterator[Path]:
    """Make sound graphs of a checkpoint in several ways."""
    path = stage / f"clean.{dtype}.onnx"
    if dtype.is_quantised:
        options = [{"observer": one} for one in Observer]
        for changed in [*options, {"smooth": 0.5}, {"quantize_attention": True}]:
            job = CalibrateJob(
                subject.graph(Dtype.FP32), dtype, subject.images, path, compile=False,
                gate_cosine=0.9, force=True, **changed,
            )  # fmt: skip
            yield run_calibrate(job)[0]
        return
    ways = (Target.TENSORRT, InputFormat.FLOAT), (Target.ONNXRUNTIME, InputFormat.UINT8)
    for target, input_format in ways:
        job = OnnxJob(
            str(subject.checkpoint), path, heads=subject.heads, dtype=dtype, target=target,
            input_format=input_format, images=subject.checked, batch=BATCH, force=True,
        )  # fmt: skip
        yield run_onnx(job)[0]


def alarms(subject: Subject, dtype: Dtype, stage: Path) -> list[tuple[str, ...]]:
    """Give the reasons why each sound graph is refused; none where it passes."""
    reference = str(subject.reference(dtype))
    return [
        run_validate(ValidateJob(reference, str(path), images=subject.checked, batch=BATCH)).reasons
        for path in clean(subject, dtype, stage)
    ]


def bucket(effect: float) -> int:
    """Give the place among ``EDGES``; the last is for whatever is larger, infinity too."""
    return next(i for i in range(len(EDGES) - 1) if effect < EDGES[i + 1] or i == len(EDGES) - 2)


def table(found: list[Planted], refused: dict[Dtype, list[tuple[str, ...]]]) -> str:
    """One row a precision: caught of planted by effect, located, false alarms."""
    between = itertools.pairwise(EDGES[1:-1])
    names = ["below 0.5", *(f"{low:g} to {high:g}" for low, high in between)]
    head = ["precision", *names, f"{EDGES[-2]:g} and more", "located", "false alarms"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for dtype in DTYPES:
        mine = [one for one in found if one.row.dtype is dtype]
        cells = []
        for index in range(len(EDGES) - 1):
            held = [one for one in mine if bucket(one.row.effect) == index]
            cells.append(f"{sum(one.is_caught for one in held)} of {len(held)}" if held else "")
        asked = [one for one in mine if one.found is not None]
        located = f"{sum(one.is_located for one in asked)} of {len(asked)}"
        wrong = f"{sum(bool(r) for r in refused[dtype])} of {len(refused[dtype])}"
        lines.append("| " + " | ".join([str(dtype), *cells, located, wrong]) + " |")
    return "\n".join(lines)


def missed(found: list[Planted]) -> str:
    """Name what had to be caught and was not, and the kinds that ``drift`` locates elsewhere."""
    large = [one for one in found if one.row.must_be_caught]
    escaped = [str(one.row) for one in large if not one.is_caught]
    elsewhere: dict[str, list[str]] = {}
    for one in found:
        if one.found is not None and not one.is_located:
            elsewhere.setdefault(one.row.fault.kind, []).append(f"{one.row.dtype}: {one.found}")
    lines = [
        f"Not detected of {len(large)} at {LEAST:g} and more: {'; '.join(escaped) or 'none'}.",
        "",
    ]
    lines += ["| kind that `drift` locates elsewhere | times | where |", "|---|---|---|"]
    for name, places in sorted(elsewhere.items()):
        lines.append(f"| {name} | {len(places)} | {', '.join(sorted(set(places)))} |")
    return "\n".join(lines)


def draw(found: list[Planted]) -> None:
    """Draw the share that is caught against the effect."""
    plt.rcParams["svg.hashsalt"] = "proof"
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for dtype in DTYPES:
        mine = [one for one in found if one.row.dtype is dtype]
        held = [[o for o in mine if bucket(o.row.effect) == i] for i in range(len(EDGES) - 1)]
        points = [(i, sum(o.is_caught for o in h) / len(h)) for i, h in enumerate(held) if h]
        axes.plot(*zip(*points, strict=True), marker="o", label=str(dtype))
    axes.set_xticks(range(len(EDGES) - 1), [f"from {edge:g}" for edge in EDGES[:-1]])
    axes.set_xlabel("effect, in multiples of the clean error")
    axes.set_ylabel("share caught")
    axes.legend()
    figure.savefig(CURVE, metadata={"Date": None})
    plt.close(figure)


def processor() -> str:
    """Name the processor and the widest of its instruction sets that matter here."""
    facts = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    flags = facts.get("flags", "").split()
    return f"{facts.get('model name', 'unknown')} ({', '.join(n for n in known if n in flags)})"


def main() -> None:
    """Plant, judge, and write the page's part."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=180.0, help="for planting faults")
    asked = options.parse_args()
    torch.set_num_threads(1)
    candidates: list[Candidate] = []
    refused: dict[Dtype, list[tuple[str, ...]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs.main(folder / "photographs")
        (folder / "digits-kept").mkdir()
        subjects = [
            fault_table.sharp(folder, folder / "photographs"),
            fault_table.trained(folder, digits.kept(folder / "digits-kept")),
        ]
        for dtype in DTYPES:
            for subject in subjects:
                refused.setdefault(dtype, []).extend(alarms(subject, dtype, folder))
                candidates.append(Candidate(subject, dtype, folder))
        found, every = planted(candidates, asked.seed, asked.minutes)
    draw(found)
    today = datetime.datetime.now(tz=datetime.UTC).date()
    text = (
        f"{len(found)} faults of {len({one.row.fault.kind for one in found})} kinds, of "
        f"{every} that the seed draws: seed {asked.seed}, {today}, {processor()}.\n\n"
        f"{table(found, refused)}\n\n{missed(found)}"
    )
    replace_part(PROOF, "kinds", text)


if __name__ == "__main__":
    main()
