"""Time a GPU's engines against torch and onnxruntime in one interleaved run, agreement beside it.

    python benchmarks/gpu.py --images demo/photographs

Needs an NVIDIA card; without a TensorRT that compiles for it, the engines are left out with the
reason. Each contender runs in every round, the order rotated; a round times a burst of calls between
two CUDA events; inputs rotate, so that no cache holds the answer. Ratios are taken round by round
against torch SDPA and their median and quartiles given. The share of the ceiling is the model's
multiply-adds, as counted from its graph, over the fastest fp16 matrix product that the same card
reached in the same run. Results are written after every batch, so that a run cut short keeps them;
--budget begins nothing new after so many seconds and says so in the rows. The engine is built, and run for
the first time, in a process of its own: what ends that process is a row's reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_contenders import DEVICE, FAILURES, Engine, Run, contenders, one_line, reference
from gpu_table import line, write
from gpu_timing import calls_of_a_burst, ceilings, time_all

from msn_export import manifest
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.engine.options import find_backend
from msn_export.engine_header import may_target
from msn_export.errors import BuildError, MsnExportError
from msn_export.graph import io
from msn_export.graph.summary import macs
from msn_export.host import Driver, NoDriver, find_driver
from msn_export.metrics.evaluate import Sample, draw
from msn_export.metrics.metrics import Comparison
from msn_export.models.checkpoint import load_checkpoint
from msn_export.progress import Silent
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Head, InputFormat

ROOT = Path(__file__).parent.parent
MODELS = ("random:vit-msn-small:0", "random:vit-msn-base:0")
BASE = "torch SDPA"
SLOW = "torch.compile"  # compiles for each batch: warmed up last, so that a budget ends there
PACKAGES = ("torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "triton")
SETS = 4  # inputs that rotate


def export(model: str, images: Path, folder: Path, batch: BatchRange) -> tuple[Path, Engine]:
    """Export the fp32 master and the fp16 graph, and build the fp16 engine, or say why not."""
    folder.mkdir()
    master, graph, engine = (folder / name for name in ("m.onnx", "m.fp16.onnx", "m.engine"))
    shared: dict[str, Any] = {"heads": (Head.CLS,), "batch": batch, "images": images}
    run_onnx(OnnxJob(model, master, **shared), Silent())
    run_onnx(OnnxJob(model, graph, dtype=Dtype.FP16, **shared), Silent())
    try:
        build(master, engine, images)
    except MsnExportError as error:
        return graph, error
    return graph, engine


def build(master: Path, engine: Path, images: Path) -> None:
    """Build the fp16 engine for the first card and have it checked there, by the command.

    Raises:
        MsnExportError: there is none; a crash is one too.
    """
    driver = find_driver()
    assert isinstance(driver, Driver)
    row, card = find_backend().row, driver.devices[0].capability
    command = [sys.executable, "-P", "-m", "msn_export", "trt", master, "-o", engine, "--fp16"]
    run = subprocess.run(
        [*command, "--images", images, *target(row.targets_capabilities, card)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        said = (run.stderr.strip().splitlines() or [""])[-1]
        raise BuildError(f"msn-export trt ended with {run.returncode}: {said}")


def target(targets: bool, card: ComputeCapability) -> list[str]:
    """Name the card to a compiler that would else write for any, where it knows the card."""
    return ["--compute-capability", str(card)] if targets and may_target(card) else []


def inputs_of(sample: Sample, batch: int) -> list[torch.Tensor]:
    """Put ``SETS`` different batches of photographs on the card."""
    return [
        torch.from_numpy(
            sample.preprocess(range(index * batch, (index + 1) * batch), InputFormat.FLOAT)
        ).to(DEVICE)
        for index in range(SETS)
    ]


def agreement(run: Run, exact: list[np.ndarray], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Compare a contender's embeddings with the fp32 reference's on the same card."""
    comparison = Comparison()
    for wanted, images in zip(exact, inputs, strict=True):
        comparison.add(wanted, run(images).float().cpu().numpy())
    found = comparison.agreement()
    return {"cosine_min": found.cosine_min, "max_abs": found.max_abs}


def measure(
    model: str, asked: argparse.Namespace, ceiling: float, folder: Path
) -> Iterator[list[dict[str, Any]]]:
    """Measure one model; give the rows of each batch."""
    checkpoint = load_checkpoint(model)
    batch = BatchRange(1, min(8, max(asked.batches)), max(asked.batches))
    graph, engine = export(model, asked.images, folder, batch)
    read = manifest.read(graph)
    assert read is not None  # it was exported above
    assert read.preprocessing is not None
    sample = draw(asked.images, read.preprocessing)
    work = 2 * macs(io.load(graph))
    exact = reference(checkpoint.model)
    with ExitStack() as owned, torch.inference_mode():
        every = list(contenders(checkpoint.model, graph, engine, owned))
        runs = {one.name: one.run for one in every if one.run is not None}
        reasons = {one.name: one.reason for one in every if one.run is None}
        for size in asked.batches:
            rows = []
            found = measure_batch(runs, exact, inputs_of(sample, size), asked)
            for one in every:
                row = {"model": model, "batch": size, "contender": one.name}
                row |= {"reason": reasons[one.name]} if one.name in reasons else found[one.name]
                if "ms" in row:
                    row["images_s"] = size * 1000 / row["ms"]
                    row["of_ceiling"] = work * size / row["ms"] / 1e9 / ceiling
                rows.append(row)
                print(line(row), flush=True)
            yield rows


def measure_batch(
    runs: dict[str, Run], exact: Run, inputs: list[torch.Tensor], asked: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Compare and time everyone on the same inputs; whoever fails at this size says why."""
    wanted = [exact(images).cpu().numpy() for images in inputs]
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, int] = {}
    for name, run in sorted(runs.items(), key=lambda item: item[0].startswith(SLOW)):
        if asked.is_over():
            found[name] = {"reason": f"not begun: the {asked.budget:g} s of --budget are over"}
            continue
        try:
            found[name] = agreement(run, wanted, inputs)
            calls[name] = calls_of_a_burst(run, inputs)
        except FAILURES as error:  # of memory, of a compiler that torch.compile starts only now
            found[name] = {"reason": one_line(error)}
    times = time_all({name: runs[name] for name in calls}, calls, inputs, asked.rounds)
    for name, rounded in times.items():
        # without torch SDPA there is nothing to hold a time against: its ratio is not a number
        ratios = np.asarray(rounded) / np.asarray(times.get(BASE, [np.nan]))
        found[name] |= {
            "ms": statistics.median(rounded),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
        }
    return found


def about(driver: Driver, measured: dict[str, float], rounds: int) -> dict[str, Any]:
    """Say where, when and with what this was measured."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit() or None,
        "device": driver.devices[0].name,
        "capability": str(driver.devices[0].capability),
        "cuda_driver": driver.cuda,
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in PACKAGES
            if any(one.name == name for one in importlib.metadata.distributions())
        },
        "ceilings": measured,
        "rounds": rounds,
    }


def commit() -> str:
    """Give the commit of the tree; that of a bundle is in its ``commit.txt``."""
    if (ROOT / "commit.txt").exists():
        return (ROOT / "commit.txt").read_text().strip()
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def over_after(seconds: float) -> Callable[[], bool]:
    """Make what tells whether so many seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def main(arguments: list[str]) -> None:
    """Measure, print the table, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS, help="checkpoints")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    asked = parser.parse_args(arguments)
    asked.is_over = over_after(asked.budget)
    driver = find_driver()
    if isinstance(driver, NoDriver):
        raise SystemExit(f"nothing was measured: {driver.reason}")
    measured = ceilings()
    where = about(driver, measured, asked.rounds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, model in enumerate(asked.models):
            if asked.is_over():
                print(f"{model}: not begun: the {asked.budget:g} s of --budget are over")
                continue
            for found in measure(model, asked, measured["fp16_tflop_s"], Path(folder, str(index))):
                rows += found
                write(asked.output, where, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
