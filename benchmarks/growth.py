"""Measure how export, calibrate, embed and report grow with the images and with the model.

    python benchmarks/growth.py [--rounds N] [--only NAME …] [--plot]

vit-msn-small with 1, 2, 4 and 8 times the images, and small, base, large and large-7 with a few: one process
a run, in random order with a pause between. Weights are random, pictures are seeded crops of photographs.
``--only`` takes commands, models and ``images`` (the runs with more than a few); runs of another time stay in
the results, each with its commit. About 25 minutes on two idle cores, half of it large-7. ``--plot`` runs nothing and draws docs/images/growth-light.svg and growth-dark.svg from
benchmarks/results/growth.json.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from export import measure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from msn_export.host import this_machine
from msn_export.manifest import versions_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "growth.json"
IMAGES = ROOT / "docs" / "images"
# Pictures with every model, few enough for large-7; an export checks 16 at most
FEW = {"onnx": 16, "calibrate": 8, "embed": 16, "report": 4}
# Pictures with vit-msn-small: more where the start would hide their share
LEAST = {"onnx": 16, "calibrate": 16, "embed": 64, "report": 8}
COUNTS = {
    command: tuple(times * least for times in (1, 2, 4, 8)) for command, least in LEAST.items()
}
MODELS = ("small", "base", "large", "large-7")
PAUSE = 2.0  # seconds between runs
Row = dict[str, Any]


@dataclass(frozen=True, order=True)
class Run:
    """One command on one model with a number of pictures."""

    command: str
    model: str
    images: int

    @property
    def names(self) -> set[str]:
        """Words of ``--only`` that choose it."""
        return {self.command, self.model} | (
            {"images"} if self.images > FEW[self.command] else set()
        )


def every() -> list[Run]:
    """List all runs."""
    grown = {Run(command, "small", count) for command in COUNTS for count in COUNTS[command]}
    return sorted(
        grown | {Run(command, model, FEW[command]) for command in COUNTS for model in MODELS}
    )


def main() -> None:
    """Run what is asked for, write the results, or draw those that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="draw, run nothing")
    options = parser.parse_args()
    if not options.plot:
        chosen = [run for run in every() if not options.only or run.names & set(options.only)]
        if not chosen:
            parser.error(f"--only {' '.join(options.only)} names no run")
        _write(_measured(chosen * options.rounds), options.json)
    found = json.loads(options.json.read_text())
    for row in exponents(found):
        print(*row, sep="\t")
    plot(found)


def _measured(runs: list[Run]) -> list[Row]:
    random.shuffle(runs)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = _prepare(folder, runs)
        for number, run in enumerate(runs):
            time.sleep(PAUSE)
            figures = measure(command_of(run, folder), folder / "log")
            row = asdict(run) | {"multiply_adds": work[run.model]} | figures
            found.append(row | {"commit": _commit(), "date": time.strftime("%Y-%m-%d")})
            print(f"{number + 1}/{len(runs)}", row, file=sys.stderr, flush=True)
    return found


def _prepare(folder: Path, runs: list[Run]) -> dict[str, float]:
    """Write pictures and the graphs that commands begin with; give the models' work an image."""
    from calibration_memory import crops

    (folder / "all").mkdir()
    pictures = sorted(crops(folder / "all").iterdir())
    for images in {run.images for run in runs}:
        (folder / f"{images}").mkdir()
        for picture in pictures[:images]:
            (folder / f"{images}" / picture.name).symlink_to(picture)
    work = {}
    for model in {run.model for run in runs}:
        graph = _export(model, "fp32", folder)
        shown = subprocess.run(
            [*_command("inspect", str(graph)), "--json"], check=True, stdout=subprocess.PIPE
        )
        work[model] = json.loads(shown.stdout)["multiply_adds"]
        if any(run.command == "report" and run.model == model for run in runs):
            _export(model, "fp16", folder)
    return work


def _export(model: str, dtype: str, folder: Path) -> Path:
    output = folder / f"{model}-{dtype}.onnx"
    command = _command("onnx", f"random:vit-msn-{model}:0", "--no-check", "--dtype", dtype)
    subprocess.run([*command, "-o", str(output)], check=True, stdout=subprocess.DEVNULL)
    return output


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "msn_export", *arguments]


def command_of(run: Run, folder: Path) -> list[str]:
    """Give the command line of a run."""
    graph, half = (str(folder / f"{run.model}-{dtype}.onnx") for dtype in ("fp32", "fp16"))
    pictures, limit = str(folder / f"{run.images}"), str(run.images)
    match run.command:
        case "onnx":
            command = _command("onnx", f"random:vit-msn-{run.model}:0", "--images", pictures)
            output = "out.onnx"
        case "calibrate":
            command = _command("calibrate", graph, "--int8", "--images", pictures, "--limit", limit)
            command += ["--no-compile", "--gate-cosine", "0.9"]
            output = "out-int8.onnx"
        case "embed":
            command, output = _command("embed", graph, pictures), "out.npy"
        case _:
            command = _command("report", graph, half, "--images", pictures, "--limit", limit)
            output = "out.html"
    return [*command, "-o", str(folder / output), "--force"]


def _commit() -> str:
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _write(rows: list[Row], results: Path) -> None:
    """Put new runs in the place of older ones of the same command, model and images."""
    measured = {_key(row) for row in rows}
    held = json.loads(results.read_text())["runs"] if results.exists() else []
    kept = [row for row in held if _key(row) not in measured]
    found = {
        "machine": asdict(this_machine()),
        "versions": versions_of("msn-export", "torch", "onnxruntime-gpu", "onnxsim"),
        "runs": sorted(kept + rows, key=lambda row: [str(part) for part in _key(row)]),
    }
    results.write_text(json.dumps(found, indent=1) + "\n")


def _key(row: Row) -> tuple[str, str, int]:
    return row["command"], row["model"], row["images"]


def medians(found: dict[str, Any], command: str, axis: str, figure: str) -> dict[float, float]:
    """Give a figure's median by the images, or by the model's work."""
    by: dict[float, list[float]] = {}
    for row in found["runs"]:
        grown = row["images"] in COUNTS[command] and row["model"] == "small"
        if row["command"] == command and (
            grown if axis == "images" else row["images"] == FEW[command]
        ):
            by.setdefault(row[axis], []).append(row[figure])
    return {at: statistics.median(values) for at, values in sorted(by.items())}


def exponent(points: dict[float, float]) -> float:
    """Give the slope of the last step in a double logarithmic plot; NaN of fewer than two."""
    if len(points) < 2:
        return math.nan
    (x0, y0), (x1, y1) = list(points.items())[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


AXES = {"images": "images, vit-msn-small", "multiply_adds": "multiply-adds of an image"}
FIGURES = {"wall_s": "seconds", "cpu_s": "processor seconds", "peak_gb": "peak memory, GB"}
# text and the commands' colours
THEMES = {
    "light": ("#1f2328", ("#0b6e4f", "#b35900", "#0550ae", "#8250df")),
    "dark": ("#e6edf3", ("#3fb68b", "#e0823d", "#6cb6ff", "#b083f0")),
}


def exponents(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Give a row of each command and axis: the exponents of its figures' last step."""
    yield ("command", "grows with", *FIGURES.values())
    for command in COUNTS:
        for axis, what in AXES.items():
            cells = (exponent(medians(found, command, axis, figure)) for figure in FIGURES)
            yield (command, what, *(f"{cell:.2f}" for cell in cells))


def plot(found: dict[str, Any]) -> None:
    """Draw the results for light and for dark pages."""
    for theme in THEMES:
        with mpl.rc_context({"svg.hashsalt": "growth"}):
            draw(found, theme).savefig(
                IMAGES / f"growth-{theme}.svg", metadata={"Date": None, "Creator": None}
            )


def draw(found: dict[str, Any], theme: str) -> Figure:
    """Draw time and memory against images, left, and against the model's work, right."""
    text, colours = THEMES[theme]
    settings: Any = {
        "font.size": 9, "text.color": text, "axes.labelcolor": text, "axes.edgecolor": text,
        "xtick.color": text, "ytick.color": text, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for line, (name, label) in enumerate(
            (key, value) for key, value in FIGURES.items() if key != "cpu_s"
        ):
            for column, axis in enumerate(AXES):
                _draw(grid[line][column], found, (axis, name), colours)
            grid[line][0].set_ylabel(label)
        for column, label in enumerate(AXES.values()):
            grid[1][column].set_xlabel(label)
    return figure


def _draw(
    axes: Axes, found: dict[str, Any], what: tuple[str, str], colours: tuple[str, ...]
) -> None:
    axis, figure = what
    ticks: set[float] = set()
    for command, colour in zip(COUNTS, colours, strict=True):
        points = medians(found, command, axis, figure)
        label = f"{command}: exponent {exponent(points):.2f}"
        axes.plot(list(points), list(points.values()), marker="o", color=colour, label=label)
        ticks |= points.keys()
    axes.set_xscale("log", base=2 if axis == "images" else 10)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    labels = [f"{tick:g}" if tick < 1e6 else f"{tick / 1e9:.3g}·10⁹" for tick in sorted(ticks)]
    axes.set_xticks(sorted(ticks), labels)
    axes.minorticks_off()
    axes.patch.set_alpha(0)
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0, fontsize=8)


if __name__ == "__main__":
    main()
