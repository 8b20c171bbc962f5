"""Measure accuracy against labelled images per class; write the table and plot of docs/lowshot.md.

    python scripts/lowshot.py [--from-json]

tests/builders/digits_backbone.py trains a backbone without labels on digits. Its graphs run in
onnxruntime; on each draw of the training images logistic regression is fitted on their features, and
judged on the 599 images for testing. Ten draws, the same for every row; ``fit`` has to agree on one of
them. Results go to benchmarks/results/lowshot.json, from which --from-json writes the page again. The
trained backbone stays in build/digits. About ten minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
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
from tests.builders.low_shot import DRAWS, SEED, C, Features, accuracies, of_graph, of_pixels

TRAINED = Path("build/digits")
RESULTS = Path("benchmarks/results/lowshot.json")
PAGE, PLOT = Path("docs/lowshot.md"), Path("docs/images/lowshot.svg")
SHOTS = (1, 2, 5, 10, None)
CHECKED = 5  # of them, where ``fit`` has to give the same
KEPT = ("0.7", "0.5", "0.3")
DRAWN = ("pixels", "msn, before training", "msn", "embedding", "msn, 0.5 of the patches", "msn, 0.3 of the patches")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A folder with the graphs, and the pictures that are drawn from and judged on."""

    folder: Path
    train: Labelled
    test: Labelled

    @classmethod
    def of(cls, folder: Path) -> "Bench":
        """Write the pictures; two hundred of the training set, unlabelled, serve the checks."""
        train, test = digits.load()
        train.write(folder / "images", 200)
        sides = (train.write_labelled(folder / "train"), test.write_labelled(folder / "test"))
        return cls(folder, *map(read_labelled, sides))

    def export(self, name: str, checkpoint: Path, **options: Any) -> Path:
        """Export [CLS] before and behind the final LayerNorm."""
        given = {"heads": ("features", "cls"), "images": self.folder / "images", **options}
        return msn_export.export(checkpoint, self.folder / f"{name}.onnx", **given).path

    def quantise(self, graph: Path) -> Path:
        """Calibrate a graph for int8."""
        images, output = self.folder / "images", self.folder / "int8.onnx"
        return msn_export.calibrate(graph, "int8", images, output, compile=False).path

    def row(
        self, name: str, fitted: Path, tested: Path, output: str = "features"
    ) -> dict[str, Any]:
        """Fit on one graph's features, test on another's; ``evaluate`` asks the neighbours."""
        sides = of_graph(self.train, fitted, output), of_graph(self.test, tested, output)
        knn = msn_export.evaluate(
            tested, self.test.source, train=self.train.source, output_name=output
        ).knn
        assert knn is not None
        return row(name, *sides, knn.top1)

    def fit(self, checkpoint: Path, features: str) -> list[float]:
        """Let ``fit`` draw and judge the same."""
        found = msn_export.fit(
            checkpoint, self.train.source, self.folder / f"fit-{features}.onnx", features=features,
            shots=CHECKED, draws=DRAWS, seed=SEED, C=C, test=self.test.source,
        ).manifest.fit  # fmt: skip
        assert found is not None
        assert found.accuracy is not None
        return list(found.accuracy.draws)


def measure(folder: Path) -> dict[str, Any]:
    """Train, export, and measure every row."""
    bench = Bench.of(folder)
    TRAINED.mkdir(parents=True, exist_ok=True)
    trained = digits_backbone.kept(TRAINED)
    fresh = bench.export("fresh", digits_backbone.untrained(folder / "fresh"))
    fp32 = bench.export("fp32", trained)
    others = {"fp16": bench.export("fp16", trained, dtype="fp16"), "int8": bench.quantise(fp32)}
    rows = [row("pixels", of_pixels(bench.train), of_pixels(bench.test))]
    rows.append(bench.row("msn, before training", fresh, fresh))
    for name, output in (("msn", "features"), ("embedding", "embedding")):
        rows.append(bench.row(name, fp32, fp32, output))
        # the classifier of fp32 features, for fit's graph is quantised after it was fitted
        rows += [
            bench.row(f"{name}, {dtype}", fp32, other, output) for dtype, other in others.items()
        ]
        differ(rows[-3], bench.fit(trained, name), len(bench.test))
    for share in KEPT:
        graph = bench.export(f"kept-{share}", trained, keep_patches=share)
        rows.append(bench.row(f"msn, {share} of the patches", graph, graph))
    packages = (torch, onnxruntime, sklearn)
    return {
        "train": len(bench.train), "test": len(bench.test), "draws": DRAWS, "seed": SEED, "C": C,
        "versions": {package.__name__: package.__version__ for package in packages},
        "rows": rows,
    }  # fmt: skip


def row(name: str, train: Features, test: Features, knn: float | None = None) -> dict[str, Any]:
    """Fit on each draw; give every accuracy by images per class."""
    found = {str(shots or "all"): accuracies(train, test, shots) for shots in SHOTS}
    print(f"{name}: {', '.join(map(cell, found.values()))}", flush=True)
    return {"name": name, "accuracies": found, "knn": knn}


def differ(measured: dict[str, Any], fitted: list[float], images: int) -> None:
    """Refuse to go on where ``fit`` gives another accuracy; one image may be a tie."""
    for ours, its in zip(measured["accuracies"][str(CHECKED)], fitted, strict=True):
        if abs(ours - its) > 1.5 / images:
            raise SystemExit(f"{measured['name']}: fit gives {its:.4f}, scikit-learn {ours:.4f}")


def cell(shares: list[float]) -> str:
    """Write mean and standard deviation in percent."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def table(results: dict[str, Any]) -> str:
    """Write one line for each row."""
    head = ["features", *(f"{shots} a class" if shots else "all" for shots in SHOTS), "neighbours"]
    lines: Iterator[list[str]] = (
        [
            one["name"],
            *map(cell, one["accuracies"].values()),
            "" if one["knn"] is None else f"{100 * one['knn']:.1f}",
        ]
        for one in results["rows"]
    )
    written = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in written)


def draw(results: dict[str, Any]) -> None:
    """Draw accuracy against images per class, with bars of one standard deviation."""
    plt.rcParams["svg.hashsalt"] = "lowshot"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = {one["name"]: one["accuracies"] for one in results["rows"]}
    for number, name in enumerate(DRAWN):
        means = [100 * statistics.mean(shares) for shares in rows[name].values()]
        bars = [100 * statistics.stdev(s) if len(s) > 1 else 0 for s in rows[name].values()]
        places = [place + (number - len(DRAWN) / 2) / 40 for place in range(len(SHOTS))]
        axes.errorbar(places, means, bars, marker="o", markersize=4, capsize=2, label=name)
    axes.set_xticks(range(len(SHOTS)), [str(shots or "all") for shots in SHOTS])
    axes.set_xlabel("labelled images per class")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


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
