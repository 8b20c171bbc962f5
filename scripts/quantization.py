"""Quantise two published shapes and a trained classifier, and write docs/quantization.md.

    python scripts/quantization.py demo/photographs

What was made is kept in demo/quantization and not made again: remove that to measure anew. About
half an hour on two cores. The classifier is the one that tests/digits.py trains; the memory figures are
those of benchmarks/calibration_memory.py.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import digits  # noqa: E402
import engine_graphs  # noqa: E402

from msn_export.calibration.formats import FORMATS  # noqa: E402
from msn_export.calibration.plan import BLOCK_ROLES, Plan  # noqa: E402
from msn_export.calibration.projections import find_projections  # noqa: E402
from msn_export.calibration.qdq import Scheme, find_operands  # noqa: E402
from msn_export.engine.backend import find_backend  # noqa: E402
from msn_export.engine.build import build_engine  # noqa: E402
from msn_export.engine.job import BuildSpec  # noqa: E402
from msn_export.graph import io  # noqa: E402
from msn_export.graph.fuse import fuse_attention  # noqa: E402
from msn_export.graph.precision import type_graph  # noqa: E402
from msn_export.runtime import open_runner  # noqa: E402
from msn_export.spec import AttentionForm, BatchRange, ComputeCapability, Dtype  # noqa: E402

Told = dict[str, Any]
SHAPES = ("vit-msn-small", "vit-msn-base")
FORMS = ("int8", "fp8")
# each with --smooth off; beside them stands the run with smoothing chosen
CHOICES: tuple[tuple[str, ...], ...] = (
    ("--observer", "max"),
    (),
    ("--bias-correction",),
    ("--quantize-attention",),
)
DIGITS: tuple[tuple[str, ...], ...] = (
    ("--observer", "max"),
    ("--observer", "percentile"),
    ("--observer", "entropy"),
    (),
    ("--bias-correction",),
    ("--quantize-attention",),
)
TOKENS = ((32, 8), (56, 8), (64, 8), (224, 16), (352, 16), (368, 16), (512, 16))
MEMORY = ROOT / "benchmarks" / "results" / "calibration_memory.json"


@dataclass(frozen=True)
class Bench:
    """A folder of artifacts that are made once."""

    folder: Path
    images: Path

    def run(self, output: str, *arguments: str) -> Told:
        """Run a command that writes ``output``, unless it was; give its manifest."""
        path = self.folder / output
        manifest = path.with_name(f"{output}.json")
        if not manifest.is_file():
            command = [
                sys.executable,
                "-m",
                "msn_export.cli",
                *arguments,
                "-o",
                str(path),
                "--json",
            ]
            print(" ".join(("msn-export", *arguments)), flush=True)
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        told: Told = json.loads(manifest.read_text())
        return told

    def export(self, output: str, checkpoint: str, images: Path, *options: str) -> Told:
        """Export a graph."""
        return self.run(output, "onnx", checkpoint, "--images", str(images), *options)

    def calibrate(self, output: str, graph: str, images: Path, *options: str) -> Told:
        """Quantise one."""
        path = str(self.folder / graph)
        return self.run(output, "calibrate", path, "--images", str(images), *options)


def row(*cells: object) -> str:
    """Write a row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def percent(share: float | None) -> str:
    """Write a share; an unknown one is none."""
    return "none" if share is None else f"{share:.0%}"


def shape_rows(bench: Bench) -> list[str]:
    """Quantise the shapes over the photographs and compile them."""
    rows = []
    for shape in SHAPES:
        graph = f"{shape}.onnx"
        bench.export(graph, f"random:{shape}:0", bench.images, "--head", "tokens")
        for form in FORMS:
            told = bench.calibrate(f"{shape}.{form}.onnx", graph, bench.images, f"--{form}")
            record, check = told["quantization"], told["check"]
            one, twin = record["compiled"][form], record["compiled"]["fp16"]
            rows.append(row(
                shape, form, f"{one['multiplied']} of {one['products']}",
                f"{one['fused_attention']}/{told['attention']['expected']}",
                f"{one['kernels']} ({twin['kernels']})",
                f"{one['bytes'] / 1e6:.1f} ({twin['bytes'] / 1e6:.1f})",
                f"{told['bytes'] / 1e6:.1f} ({record['sizes']['fp16'] / 1e6:.1f})",
                f"{check['cosine_p1']:.5f} ({record['twin']['cosine_p1']:.7f})",
                percent(record["neighbours"][form]), len(record["kept"]),
                f"{told['seconds']:.0f}", f"{told['peak_rss_bytes'] / 1e9:.1f}",
            ))  # fmt: skip
    return rows


def choice_rows(bench: Bench) -> list[str]:
    """Quantise vit-msn-small with other options."""
    graph = "vit-msn-small.onnx"
    rows = []
    for options in CHOICES:
        asked = ("--smooth", "off", *options)
        attention = "--quantize-attention" in options
        cells = []
        for form in FORMS:
            told = bench.calibrate(
                f"small.{form}{''.join(asked)}.onnx", graph, bench.images, f"--{form}", *asked,
                "--gate-cosine", "0.9", *(() if attention else ("--no-compile",)),
            )  # fmt: skip
            one = told["quantization"]["compiled"].get(form)
            figures = f" ({one['kernels']} kernels, {one['fused_attention']} fused)" if one else ""
            cells.append(f"{told['check']['cosine_p1']:.5f}{figures}")
        rows.append(row(f"`{' '.join(asked)}`", *cells))
    chosen = [bench.calibrate(f"vit-msn-small.{form}.onnx", graph, bench.images) for form in FORMS]
    cells = [f"{told['check']['cosine_p1']:.5f} (chose {strength(told)})" for told in chosen]
    return [*rows, row("`--smooth auto`, as it is without options", *cells)]


def strength(told: Told) -> str:
    """Name the smoothing that was taken."""
    taken = told["quantization"]["smoothing"]
    return "off" if taken is None else f"{taken:g}"


def attention_rows(bench: Bench) -> list[str]:
    """Compile one block with 8-bit attention, at several numbers of tokens."""
    rows = []
    for size, patch in TOKENS:
        vit = engine_graphs.Vit(dtype="fp32", depth=1, dim=384, heads=6, size=size, patch=patch)
        cells = []
        for form in (Dtype.INT8, Dtype.FP8):
            with tempfile.TemporaryDirectory(dir=bench.folder) as name:
                kernels, fused = compile_attention(vit, form, Path(name))
            cells.append(f"{'fused' if fused else 'taken apart'} ({kernels} kernels)")
        rows.append(row(vit.tokens, *cells))
        print(rows[-1], flush=True)
    return rows


def compile_attention(vit: engine_graphs.Vit, form: Dtype, folder: Path) -> tuple[int, int]:
    """Quantise a graph with its attention, however many tokens; count kernels, and fused ones."""
    model = io.load(engine_graphs.save(vit, folder / "m.onnx"))
    io.infer_shapes(model)
    fuse_attention(model, AttentionForm.PLAIN)
    projections = tuple(p for p in find_projections(model) if p.role in BLOCK_ROLES)
    # not Plan.of, which refuses what is to be shown here
    plan = Plan(model, Scheme(FORMATS[form], Dtype.FP16), projections, find_operands(model))
    limits = dict.fromkeys(plan.watched, 4.0) | {core.p: 1.0 for core in plan.operands}
    model = replace(plan, thresholds=limits).quantised()
    type_graph(model, Dtype.FP16, {})
    io.save(model, folder / "typed.onnx")
    spec = BuildSpec(
        folder / "typed.onnx", (BatchRange(1, 8, 32),), (ComputeCapability(8, 9),), precision=form
    )
    census = build_engine(spec, find_backend("tensorrt-rtx"), folder / "m.engine").census
    return len(census.kernels), len(census.fused_attention)


def digit_rows(bench: Bench) -> tuple[list[str], list[str], Told]:
    """Train, plant outliers, and count how many test images each graph gets right."""
    trained, planted, images = (bench.folder / name for name in ("digits", "planted", "pictures"))
    if not trained.is_dir():
        digits.train(trained)
        digits.plant(planted, trained)
        digits.plant(bench.folder / "sick", trained, [1])
        digits.load()[0].write(images, 200)
    heads = ("--head", "logits", "--head", "cls")
    bench.export("digits.onnx", str(trained), images, *heads)
    bench.export("digits.fp16.onnx", str(trained), images, *heads, "--dtype", "fp16")
    bench.export("planted.onnx", str(planted), images, *heads)
    rows = [row("fp32", "", *right(bench, "digits.onnx"), "", "")]
    rows.append(row("fp16", "", *right(bench, "digits.fp16.onnx"), "", ""))
    for form in FORMS:
        for options in DIGITS:
            if form == "fp8" and "entropy" in options:  # it is refused
                continue
            rows.append(digit_row(bench, "digits", form, options))
    planted_rows = [row("fp32", "", *right(bench, "planted.onnx"), "", "")]
    for form in FORMS:
        for options in (
            ("--observer", "max", "--smooth", "off"), ("--observer", "max"), ("--smooth", "off"), (),
        ):  # fmt: skip
            planted_rows.append(digit_row(bench, "planted", form, options))
    bench.export("sick.onnx", str(bench.folder / "sick"), images, *heads)
    options = ("--observer", "max", "--smooth", "off", "--gate-cosine", "0.995", "--no-compile")
    sick = bench.calibrate("sick.int8.onnx", "sick.onnx", images, "--int8", *options)
    sick["right"] = right(bench, "sick.int8.onnx")[0]
    return rows, planted_rows, sick


def digit_row(bench: Bench, graph: str, form: str, options: Sequence[str]) -> str:
    """Quantise and count."""
    name = f"{graph}.{form}{''.join(options)}.onnx"
    asked = (f"--{form}", *options, "--gate-cosine", "0", "--no-compile")
    told = bench.calibrate(name, f"{graph}.onnx", bench.folder / "pictures", *asked)
    said = f"`{' '.join(options) or 'as it is'}`"
    return row(form, said, *right(bench, name), f"{told['check']['cosine_p1']:.5f}", strength(told))


def right(bench: Bench, name: str) -> tuple[str]:
    """Count the test images that are recognised, in percent."""
    test = digits.load()[1]
    planes = test.planes()
    with open_runner(bench.folder / name) as runner:
        logits = [runner(planes[at : at + 32])["logits"] for at in range(0, len(planes), 32)]
    share = (np.concatenate(logits).argmax(axis=1) == test.labels).mean()
    return (f"{share * 100:.2f} %",)


def console(bench: Bench) -> str:
    """Show what a person sees."""
    if (kept := bench.folder / "console.txt").is_file():
        return kept.read_text()
    words = ["calibrate", "demo/vit-msn-small.onnx", "--int8", "--images", "demo/photographs"]
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        demo = Path(name) / "demo"
        demo.mkdir()
        for file in ("vit-msn-small.onnx", "vit-msn-small.onnx.json"):
            shutil.copy(bench.folder / file, demo / file)
        (demo / "photographs").symlink_to(bench.images.resolve())
        done = subprocess.run(
            [sys.executable, "-m", "msn_export.cli", *words], check=True, cwd=name, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    kept.write_text("\n".join([f"$ msn-export {' '.join(words)}", *lines]))
    return kept.read_text()


def main(images: Path) -> None:
    """Measure everything and write the page."""
    import onnxruntime
    import tensorrt_rtx

    folder = images.parent / "quantization"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, images)
    shapes, choices = shape_rows(bench), choice_rows(bench)
    rows, planted_rows, sick = digit_rows(bench)
    memory = json.loads(MEMORY.read_text())
    page = (Path(__file__).parent / "quantization.md.in").read_text(encoding="utf-8")
    filled = page.format(
        shapes="\n".join(shapes),
        choices="\n".join(choices),
        attention="\n".join(attention_rows(bench)),
        digits="\n".join(rows),
        planted="\n".join(planted_rows),
        sick=sick["quantization"]["verdict"],
        sick_kept="; ".join(f"{k}: {v}" for k, v in sick["quantization"]["kept"].items()),
        sick_drift=", ".join(f"{b}: {e:.2%}" for b, e in sick["quantization"]["drift"].items()),
        sick_right=sick["right"],
        memory="\n".join(
            row(run["images"], run["held_out"], f"{run['peak_rss_bytes'] / 1e6:.0f}",
                f"{run['seconds']:.0f}", f"{run['cosine_p1']:.5f}")
            for run in memory["runs"]
        ),
        apart=f"{memory['apart_bytes'] / 1e6:+.0f}",
        console=console(bench),
        rtx=tensorrt_rtx.__version__,
        ort=onnxruntime.__version__,
        python=platform.python_version(),
    )  # fmt: skip
    (ROOT / "docs" / "quantization.md").write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
