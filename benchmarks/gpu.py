"""Time a GPU's engines against torch and onnxruntime in one interleaved run, agreement beside it.

    python benchmarks/gpu.py --images demo/photographs

Needs an NVIDIA card. Each contender runs in every round, the order rotated; a round times a burst
of calls between two CUDA events; inputs rotate, so that no cache holds the answer. Ratios are taken
round by round against torch SDPA and their median and quartiles given. The share of the ceiling is
the model's multiply-adds, as counted from its graph, over the fastest fp16 matrix product that the
same card reached in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_contenders import DEVICE, Contender, Run, contenders, reference

from msn_export.check.compare import Comparison
from msn_export.check.sample import Sample, draw
from msn_export.driver import NoDriver, find_driver
from msn_export.graph import io
from msn_export.graph.work import multiply_adds
from msn_export.models.checkpoints import load_checkpoint
from msn_export.progress import Silent
from msn_export.run_onnx import OnnxJob, run_onnx
from msn_export.run_trt import run_trt
from msn_export.spec import BatchRange, Dtype, Head, InputKind
from msn_export.trt_job import TrtJob

MODELS = ("random:vit-msn-small:0", "random:vit-msn-base:0")
BASE = "torch SDPA"
PACKAGES = ("torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "triton")
SETS = 4  # inputs that rotate
BURST = (
    0.02  # seconds that one timing lasts at least: a CUDA event resolves about half a microsecond
)


def milliseconds(run: Run, inputs: list[torch.Tensor], calls: int) -> float:
    """Time ``calls`` calls on the current stream with CUDA events; milliseconds a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in range(calls):
        run(inputs[call % len(inputs)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def ceilings() -> dict[str, float]:
    """Measure what the card can do: copies in TB/s, fp16 matrix products in TFLOP/s."""
    block = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)  # 1 GiB
    other = torch.empty_like(block)
    side = 8192
    a = torch.randn(side, side, dtype=torch.float16, device=DEVICE)
    copies = min(milliseconds(lambda _: other.copy_(block), [a], 10) for _ in range(5))
    products = min(milliseconds(lambda x: x @ x, [a], 10) for _ in range(5))
    return {
        "copy_tb_s": 2 * block.nbytes / copies / 1e9,
        "fp16_tflop_s": 2 * side**3 / products / 1e9,
    }


def export(model: str, images: Path, folder: Path, batch: BatchRange) -> tuple[Path, Path]:
    """Export the fp32 master and the fp16 graph, and build the fp16 engine."""
    folder.mkdir()
    master, graph, engine = (folder / name for name in ("m.onnx", "m.fp16.onnx", "m.engine"))
    shared: dict[str, Any] = {"heads": (Head.CLS,), "batch": batch, "images": images}
    run_onnx(OnnxJob(model, master, **shared), Silent())
    run_onnx(OnnxJob(model, graph, dtype=Dtype.FP16, **shared), Silent())
    run_trt(TrtJob(master, engine, precision=Dtype.FP16, images=images), Silent())
    return graph, engine


def inputs_of(sample: Sample, batch: int) -> list[torch.Tensor]:
    """Put ``SETS`` different batches of photographs on the card."""
    return [
        torch.from_numpy(
            sample.feed(range(index * batch, (index + 1) * batch), InputKind.FLOAT)
        ).to(DEVICE)
        for index in range(SETS)
    ]


def agreement(run: Run, exact: Run, inputs: list[torch.Tensor]) -> dict[str, float]:
    """Compare a contender's embeddings with the fp32 reference's on the same card."""
    comparison = Comparison()
    for images in inputs:
        comparison.add(exact(images).cpu().numpy(), run(images).float().cpu().numpy())
    found = comparison.agreement()
    return {"cosine_min": found.cosine_min, "max_abs": found.max_abs}


def time_all(
    able: list[Contender], inputs: list[torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Run every contender in every round, the order rotated; milliseconds a call."""
    calls = {}
    for one in able:
        assert one.run is not None  # only those that can run are timed
        milliseconds(one.run, inputs, 10)  # compiles, captures, warms up
        once = milliseconds(one.run, inputs, 10)
        calls[one.name] = max(len(inputs), int(BURST * 1000 / once))
    times: dict[str, list[float]] = {one.name: [] for one in able}
    for turn in range(rounds):
        shift = turn % len(able)
        for one in able[shift:] + able[:shift]:
            assert one.run is not None
            times[one.name].append(milliseconds(one.run, inputs, calls[one.name]))
    return times


def measure(
    model: str, asked: argparse.Namespace, ceiling: float, folder: Path
) -> list[dict[str, Any]]:
    """Measure one model at every batch; give its rows."""
    checkpoint = load_checkpoint(model)
    batch = BatchRange(1, min(8, max(asked.batches)), max(asked.batches))
    graph, engine = export(model, asked.images, folder, batch)
    work = 2 * multiply_adds(io.load(graph))
    exact = reference(checkpoint.model)
    rows = []
    with ExitStack() as owned, torch.inference_mode():
        every = list(contenders(checkpoint.model, graph, engine, owned))
        sample = draw(asked.images, _preprocessing(graph))
        for size in asked.batches:
            inputs = inputs_of(sample, size)
            able = [one for one in every if one.run is not None]
            near = {one.name: agreement(one.run, exact, inputs) for one in able if one.run}
            times = time_all(able, inputs, asked.rounds)
            for one in every:
                row: dict[str, Any] = {"model": model, "batch": size, "contender": one.name}
                if one.run is None:
                    rows.append(row | {"reason": one.reason})
                    continue
                middle = statistics.median(times[one.name])
                ratios = np.asarray(times[one.name]) / np.asarray(times[BASE])
                row |= {
                    "ms": middle,
                    "images_s": size * 1000 / middle,
                    "ratio": float(np.median(ratios)),
                    "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
                    "of_ceiling": work * size / middle / 1e9 / ceiling,
                    **near[one.name],
                }
                rows.append(row)
                print(line(row), flush=True)
    return rows


def _preprocessing(graph: Path) -> Any:
    from msn_export import manifest

    read = manifest.read(graph)
    assert read is not None  # it was exported above
    return read.preprocessing


def line(row: dict[str, Any]) -> str:
    """Give a row of the Markdown table."""
    start = f"| {row['model']} | {row['batch']} | {row['contender']} |"
    if "reason" in row:
        return f"{start} not run: {row['reason']} | | | | | |"
    low, high = row["ratio_quartiles"]
    return (
        f"{start} {row['ms']:.3f} | {row['images_s']:.0f} | {row['ratio']:.2f} "
        f"({low:.2f} to {high:.2f}) | {row['of_ceiling']:.0%} | {row['cosine_min']:.6f} | "
        f"{row['max_abs']:.1e} |"
    )


HEAD = """| model | batch | | ms | images/s | of SDPA's time | of the ceiling | worst cosine | max_abs |
|---|---|---|---|---|---|---|---|---|
"""


def main(arguments: list[str]) -> None:
    """Measure, print the table, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS, help="checkpoints")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    asked = parser.parse_args(arguments)
    driver = find_driver()
    if isinstance(driver, NoDriver):
        raise SystemExit(f"nothing was measured: {driver.reason}")
    measured = ceilings()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for index, model in enumerate(asked.models)
            for row in measure(model, asked, measured["fp16_tflop_s"], Path(folder, str(index)))
        ]
    about = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
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
        "rounds": asked.rounds,
    }
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    table = HEAD + "\n".join(line(row) for row in rows) + "\n"
    asked.output.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main(sys.argv[1:])
