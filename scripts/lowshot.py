"""Measure accuracy against labelled images per class; write the table and plot of docs/lowshot.md.

    python scripts/lowshot.py [--from-json]

tests/builders/digits_backbone.py trains a backbone without labels on digits. Its graphs run in
onnxruntime; on each draw of the training images logistic regression is fitted on their features, and
judged on the 599 images for testing. Ten draws, the same for every row. Results go to
benchmarks/results/lowshot.json, from which --from-json writes the page again. Ten minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib.pyplot as plt
import onnxruntime
import sklearn
import torch
from tolerances import replace_part

import msn_export
from msn_export.labelled import Labelled, read_labelled
from tests.builders import digits, digits_backbone
from tests.builders.low_shot import SEED, C, Features, accuracies, of_graph, of_pixels

RESULTS = Path("benchmarks/results/lowshot.json")
PAGE, PLOT = Path("docs/lowshot.md"), Path("docs/images/lowshot.svg")
SHOTS = (1, 2, 5, 10, None)
HEADS = {"msn": "features", "embedding": "embedding"}
KEPT = (0.7, 0.5, 0.3)
DRAWN = (
    "pixels",
    "untrained, msn",
    "msn",
    "embedding",
    "msn, 50% of the patches",
    "msn, 30% of the patches",
)


@dataclass(frozen=True)
class Sets:
    """The labelled pictures that are drawn from, and those that are judged on."""

    train: Labelled
    test: Labelled

    def features(self, graph: Path, output: str) -> tuple[Features, Features]:
        """Run both through a graph."""
        return of_graph(self.train, graph, output), of_graph(self.test, graph, output)


def measure(folder: Path) -> dict[str, Any]:
    """Train, export, and measure every row."""
    train, test = digits.load()
    sets = Sets(
        read_labelled(train.write_labelled(folder / "train")),
        read_labelled(test.write_labelled(folder / "test")),
    )
    train.write(folder / "images", 200)
    trained, fresh = folder / "trained", digits_backbone.untrained(folder / "untrained")
    digits_backbone.train(trained)
    fp32 = export(trained, folder / "fp32.onnx")
    fp16 = export(trained, folder / "fp16.onnx", dtype="fp16")
    int8 = msn_export.calibrate(
        fp32, "int8", folder / "images", folder / "int8.onnx", compile=False
    ).path
    rows = [row("pixels", of_pixels(sets.train), of_pixels(sets.test))]
    rows.append(
        row("untrained, msn", *sets.features(export(fresh, folder / "untrained.onnx"), "features"))
    )
    for name, output in HEADS.items():
        of_train, of_test = sets.features(fp32, output)
        rows.append(row(name, of_train, of_test, neighbours(fp32, folder, output)))
        for dtype, graph in (("fp16", fp16), ("int8", int8)):
            # as a graph of a fitted classifier: weights of fp32 features, images in the other type
            found = of_graph(sets.test, graph, output)
            rows.append(row(f"{name}, {dtype}", of_train, found, neighbours(graph, folder, output)))
    for share in KEPT:
        graph = export(trained, folder / f"kept-{share}.onnx", keep_patches=str(share))
        name = f"msn, {share:.0%} of the patches"
        rows.append(
            row(name, *sets.features(graph, "features"), neighbours(graph, folder, "features"))
        )
    return {
        "draws": len(rows[0]["accuracies"]["1"]), "seed": SEED, "C": C,
        "train": len(sets.train), "test": len(sets.test), "epochs": digits_backbone.EPOCHS,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "scikit-learn": sklearn.__version__},
        "rows": rows,
    }  # fmt: skip


def export(checkpoint: Path, output: Path, **options: Any) -> Path:
    """Export [CLS] before and behind the final LayerNorm."""
    images = output.parent / "images"
    return msn_export.export(
        checkpoint, output, heads=("features", "cls"), images=images, **options
    ).path


def neighbours(graph: Path, folder: Path, output: str) -> float:
    """Ask ``evaluate`` for top-1 of 20 neighbours among the training pictures."""
    found = msn_export.evaluate(graph, folder / "test", train=folder / "train", output_name=output)
    assert found.knn is not None
    return found.knn.top1


def row(name: str, train: Features, test: Features, knn: float | None = None) -> dict[str, Any]:
    """Fit on each draw; give every accuracy by images per class."""
    found = {str(shots or "all"): accuracies(train, test, shots) for shots in SHOTS}
    print(f"{name}: {', '.join(cell(shares) for shares in found.values())}", flush=True)
    return {"name": name, "accuracies": found, "knn": knn}


def cell(shares: list[float]) -> str:
    """Write mean and standard deviation in percent."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def table(results: dict[str, Any]) -> str:
    """Write one row for each of the features."""
    head = [
        "features",
        *(f"{shots} a class" if shots else "all" for shots in SHOTS),
        "20 neighbours",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for one in results["rows"]:
        cells = [one["name"], *map(cell, one["accuracies"].values())]
        cells.append("" if one["knn"] is None else f"{100 * one['knn']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """Draw accuracy against images per class, bars of one standard deviation."""
    plt.rcParams["svg.hashsalt"] = "lowshot"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = {one["name"]: one["accuracies"] for one in results["rows"]}
    for number, name in enumerate(DRAWN):
        means = [100 * statistics.mean(shares) for shares in rows[name].values()]
        bars = [100 * statistics.stdev(s) if len(s) > 1 else 0 for s in rows[name].values()]
        places = [place + (number - 2.5) / 40 for place in range(len(SHOTS))]  # bars side by side
        axes.errorbar(places, means, bars, marker="o", markersize=4, capsize=2, label=name)
    axes.set_xticks(range(len(SHOTS)), [str(shots or "all") for shots in SHOTS])
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Measure, and write the results and the page's part."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--from-json", action="store_true", help="measure nothing, write the page")
    if not options.parse_args().from_json:
        with tempfile.TemporaryDirectory() as name:
            RESULTS.write_text(json.dumps(measure(Path(name)), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    draw(results)
    replace_part(PAGE, "digits", table(results))


if __name__ == "__main__":
    main()
