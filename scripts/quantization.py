"""Quantise two published shapes and a trained classifier, and write docs/quantization.md.

    python scripts/quantization.py demo/photographs

What was made is kept in demo/quantization and not made again: remove that to measure anew. About
half an hour on two cores. The classifier is the one that tests/builders/digits.py trains; the memory figures are
those of benchmarks/calibration_memory.py.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from quantization_attention import attention_rows
from quantization_bench import FORMS, Bench, percent, row, strength
from quantization_digits import digit_rows
from quantization_smoothing import smoothing_rows

ROOT = Path(__file__).parent.parent
SHAPES = ("vit-msn-small", "vit-msn-base")
# each with --smooth off; beside them stands the run with smoothing chosen
CHOICES: tuple[tuple[str, ...], ...] = (
    ("--observer", "max"),
    (),
    ("--bias-correction",),
    ("--quantize-attention",),
)
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = RESULTS / "calibration_memory.json"
GRAPHS = RESULTS / "graphs-avx2.json"  # the page names a processor without VNNI
GRAPHS_SHOWN = (
    "msn-export", "msn-export int8", "msn-export int8, the rest fp16", "optimum", "torch sdpa",
)  # fmt: skip


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
    return [*rows, row("`--smooth auto`, the default", *cells)]


def cpu_rows() -> list[str]:
    """Read what benchmarks/graphs.py measured of the int8 graph and of those beside it."""
    graphs = json.loads(GRAPHS.read_text())
    return [
        row(batch, who, f"{found['wall_ms']:.0f}", f"{found['wall x optimum']:.2f}",
            f"{found['wall x torch sdpa']:.2f}", f"{found['cosine']:.5f}")
        for batch in (1, 8)
        for who in GRAPHS_SHOWN
        for found in (graphs[f"batch {batch}"][who],)
    ]  # fmt: skip


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
            [sys.executable, "-m", "msn_export", *words], check=True, cwd=name, text=True,
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
        smoothing="\n".join(smoothing_rows(bench)),
        sick=sick["quantization"]["verdict"],
        sick_kept="; ".join(f"{k}: {v}" for k, v in sick["quantization"]["kept"].items()),
        sick_drift=", ".join(f"{b}: {e:.2%}" for b, e in sick["quantization"]["drift"].items()),
        sick_right=sick["right"],
        memory="\n".join(
            row(run["images"], run["held_out"], f"{run['peak_rss_bytes'] / 1e6:.0f}",
                f"{run['seconds']:.0f}", f"{run['cosine_p1']:.5f}")
            for run in memory["runs"]
        ),
        cpu="\n".join(cpu_rows()),
        apart=f"{memory['apart_bytes'] / 1e6:+.0f}",
        console=console(bench),
        rtx=tensorrt_rtx.__version__,
        ort=onnxruntime.__version__,
        python=platform.python_version(),
    )  # fmt: skip
    (ROOT / "docs" / "quantization.md").write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
