"""Measure what the gates are set by; write the tables of docs/tolerances.md and docs/proof.md.

    python scripts/tolerances.py demo/photographs vit-msn-small vit-msn-base

Seeded weights, eight photographs. For each shape the fp32 graph is compared with the PyTorch
reference and the typed and quantised graphs with the fp32 graph, by the commands' own code; then
nine faults are planted one at a time in half a vit-msn-small. Some twenty minutes on two cores.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pages import replace_part
from safetensors.torch import save_file

from msn_export import manifest
from msn_export.calibration.job import CalibrateJob
from msn_export.commands.calibrate import run_calibrate
from msn_export.commands.drift import DriftJob, run_drift
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.drift import Drift
from msn_export.compare.sides import Validation
from msn_export.models.checkpoint import load_checkpoint
from msn_export.progress import Silent
from msn_export.spec import BatchRange, Dtype, Head
from tests.builders.checkpoints import small
from tests.contracts import faults

TOLERANCES, PROOF = Path("docs/tolerances.md"), Path("docs/proof.md")
BATCH = BatchRange(1, 2, 4)
LIMIT = 8


def judge(reference: str | Path, candidate: str | Path, images: Path) -> Validation:
    """Compare two artifacts by their numbers alone."""
    job = ValidateJob(
        str(reference), str(candidate), images=images, limit=LIMIT, batch=BATCH, numbers_only=True
    )
    return run_validate(job, Silent())


def follow(reference: str | Path, candidate: str | Path, images: Path) -> Drift:
    """Compare two artifacts block by block, whatever comes of it."""
    job = DriftJob(str(reference), str(candidate), images=images, limit=LIMIT)
    return run_drift(job, Silent())


def of_cost(drift: Drift) -> float:
    """The most that a stage errs by itself, in multiples of what its precision costs there."""
    return max(s.own.times or 0.0 for s in drift.stages if s.own is not None)


def figures(name: str, dtype: str, validation: Validation, drift: Drift) -> str:
    """One row: the outputs' agreement, then the stream's."""
    check = validation.check
    rounding = [output.get("rounding") for output in check.outputs.values()]
    times = f"{max(r for r in rounding if r is not None):.2f}" if any(rounding) else ""
    errors = [stage.tensor.relative for stage in drift.stages]
    cells = (
        name, dtype, f"{check.max_abs:.1e}", f"{1 - (check.cosine_min or 0):.1e}",
        f"{1 - (check.cosine_p1 or 0):.1e}", times, f"{max(errors):.1e}",
        f"{of_cost(drift):.2f}",
    )  # fmt: skip
    print(*cells, sep=" | ", flush=True)
    return "| " + " | ".join(cells) + " |"


def shape(variant: str, images: Path, folder: Path) -> list[str]:
    """Measure one shape in every precision; 8 bits where it is the small one."""
    checkpoint = f"random:{variant}:0"
    made = {}
    for dtype in (Dtype.FP32, Dtype.FP16, Dtype.BF16):
        output = folder / f"{variant}-{dtype}.onnx"
        job = OnnxJob(checkpoint, output, dtype=dtype, heads=(Head.CLS,), images=images)
        made[dtype] = run_onnx(replace(job, batch=BATCH, check=False), Silent())[0]
    if variant == "vit-msn-small":
        for dtype in (Dtype.INT8, Dtype.FP8):
            output = folder / f"{variant}-{dtype}.onnx"
            asked = CalibrateJob(made[Dtype.FP32], dtype, images, output, smooth=0.5, compile=False)
            made[dtype] = run_calibrate(asked, Silent())[0]
    rows = []
    for dtype, candidate in made.items():
        reference = checkpoint if dtype is Dtype.FP32 else made[Dtype.FP32]
        found = judge(reference, candidate, images), follow(reference, candidate, images)
        rows.append(figures(variant, str(dtype), *found))
    return rows


def scaled(images: Path, folder: Path) -> list[str]:
    """Compare a vit-msn-small whose final gain and bias are multiplied with its fp32 graph."""
    rows = []
    for gain in (1, 20):
        state = load_checkpoint("random:vit-msn-small:0").model.state_dict()
        state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        for name in ("norm.weight", "norm.bias"):
            state[name] *= gain
        checkpoint = folder / f"gain-{gain}.safetensors"
        save_file(state, checkpoint)
        job = OnnxJob(str(checkpoint), folder / f"{gain}.onnx", variant="vit-msn-small")
        graph, _ = run_onnx(replace(job, heads=(Head.CLS,), images=images, check=False), Silent())
        asked = ValidateJob(str(checkpoint), str(graph), images=images, limit=LIMIT, batch=BATCH)
        check = run_validate(replace(asked, variant="vit-msn-small"), Silent()).check
        figures = check.outputs["embedding"]
        cells = (
            f"vit-msn-small, final gain x {gain}", f"{figures['reference_rms']:.1f}",
            f"{check.max_abs:.1e}", f"{1 - (check.cosine_min or 0):.1e}",
            f"{figures['rounding']:.2f}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def planted(images: Path, folder: Path) -> list[tuple[str, str]]:
    """Plant each fault in half a vit-msn-small for images of 64 pixels, and say what is found."""
    checkpoint = small(folder / "checkpoint")
    graph = folder / "small.onnx"
    heads = (Head.CLS, Head.LOGITS)
    run_onnx(OnnxJob(str(checkpoint), graph, heads=heads, images=images, batch=BATCH), Silent())
    rows = [caught("none", checkpoint, graph, images)]
    for name, fault in FAULTS.items():
        rows.append(caught(name, checkpoint, faults.plant(graph, folder / "m.onnx", fault), images))
    known = manifest.read(graph)
    assert known is not None
    assert known.preprocessing is not None
    nearest = replace(known.preprocessing, resample="nearest")
    (folder / "m.onnx").unlink()
    other = faults.describe(graph, folder / "m.onnx", preprocessing=nearest)
    rows.append(caught("nearest resize for bilinear", checkpoint, other, images))
    return rows


FAULTS: dict[str, Callable[..., None]] = {
    "two heads swapped": faults.swap_heads,
    "LayerNorm eps 1e-5": faults.wrong_epsilon,
    "tanh GELU for erf": faults.tanh_gelu,
    "a dropped bias": faults.dropped_bias,
    "weights of 4 bits": faults.four_bits,
    "BGR for RGB": faults.bgr,
    "positions transposed": faults.transposed_positions,
    "classes shifted by one": faults.shifted_classes,
}


def caught(name: str, checkpoint: Path, graph: Path, images: Path) -> tuple[str, str]:
    """Two rows: the figures of the outputs, and what validate and drift say."""
    validation, drift = judge(checkpoint, graph, images), follow(checkpoint, graph, images)
    check = validation.own or validation.check
    rounding = max(output["rounding"] or 0 for output in validation.check.outputs.values())
    cells = (
        name, f"{check.max_abs:.1e}", f"{1 - (check.cosine_min or 0):.1e}", f"{rounding:.3g}",
        "passed" if validation.passed else "failed", drift.parted or "nowhere",
    )  # fmt: skip
    print(*cells, sep=" | ", flush=True)
    # by the numbers alone a contradiction between the graphs is a note
    told = [*validation.reasons, *(note for note in validation.notes if "the reference's" in note)]
    if validation.cause is not None:
        told.append(f"likely cause: {validation.cause}")
    words = (name, "<br>".join(told) or "passed", drift.parted or "nowhere")
    return tuple("| " + " | ".join(row) + " |" for row in (cells, words))


def write(page: Path, name: str, head: str, rows: list[str]) -> None:
    """Replace one table of a page."""
    columns = head.count("|") - 1
    replace_part(page, name, "\n".join([head, "|---" * columns + "|", *rows]))


def main(images: Path, variants: list[str]) -> None:
    """Measure, table by table."""
    with tempfile.TemporaryDirectory() as folder:
        found = planted(images, Path(folder))
    head = "| fault | max_abs | 1 - cosine | times own rounding | numbers alone | drift |"
    write(TOLERANCES, "faults", head, [row for row, _ in found])
    head = "| fault | what `validate` says | where `drift` says they part |"
    write(PROOF, "faults", head, [row for _, row in found])
    with tempfile.TemporaryDirectory() as folder:
        rows = scaled(images, Path(folder))
    head = "| shape | RMS of the reference | max_abs | 1 - cosine | times own rounding |"
    write(TOLERANCES, "scale", head, rows)
    rows = []
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            rows += shape(variant, images, Path(folder))
    write(
        TOLERANCES,
        "gates",
        "| shape | dtype | max_abs | 1 - least cosine | 1 - p1 cosine | times own rounding "
        "| stream's largest error | own errors in multiples of their cost |",
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
