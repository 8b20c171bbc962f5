"""Measure what a runner adds to a bare ``InferenceSession.run``, or OpenVINO's, at batch 1.

    python benchmarks/runtime_overhead.py [GRAPH.onnx] [--provider openvino] [--rounds 200] [--json FILE]

Both sides run the runner's own session or compiled model, so that no second thread pool competes, by turns in random
order. The verdict is the median of the ratios of neighbours: a machine that slows down for a while
slows both. A graph that computes next to nothing shows the overhead by itself, in microseconds.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from msn_export.host import this_machine
from msn_export.manifest import versions_of
from msn_export.runtime import open_runner
from msn_export.runtime.runner import Runner

RESULTS = Path(__file__).parent / "results"
NOTHING = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[b,3,224,224] pixel_values) => (float[b,1] embedding)
<int64[4] starts = {0,0,0,0}, int64[4] ends = {1000000,1,1,1}, int64[2] shape = {-1,1}>
{ first = Slice (pixel_values, starts, ends)  embedding = Reshape (first, shape) }
"""


def main() -> None:
    """Measure both graphs, print the figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", nargs="?", type=Path, help="default: a random vit-msn-small")
    parser.add_argument("--provider", choices=("cpu", "openvino"), default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path, help="default: in results, by the provider")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graph = options.graph or export(Path(folder) / "vit-msn-small.onnx")
        nothing = Path(folder) / "nothing.onnx"
        onnx.save(onnx.parser.parse_model(NOTHING), nothing)
        told = {
            "model": measure(graph, options.rounds, options.provider),
            "nothing": measure(nothing, 20 * options.rounds, options.provider),
            "machine": machine(),
        }
    named = "runtime_overhead" + ("_openvino" if options.provider == "openvino" else "")
    output = options.json or RESULTS / f"{named}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(told, indent=2) + "\n")
    model, nothing_told = told["model"], told["nothing"]
    print(
        f"batch 1 of {model['graph']}: {model['bare_ms']:.2f} ms bare, ratio "
        f"{model['ratio']:.4f} (quartiles {model['ratio_quartiles'][0]:.4f} to "
        f"{model['ratio_quartiles'][1]:.4f}, {model['rounds']} rounds)"
    )
    print(
        f"by itself: {nothing_told['overhead_us']:.1f} us a call, "
        f"{nothing_told['overhead_us'] / model['bare_ms'] / 10:.3f} % of it"
    )


def export(output: Path) -> Path:
    """Export a ViT-MSN-small with seeded random weights."""
    command = ["msn-export", "onnx", "random:vit-msn-small:0", "--no-check", "-o", str(output)]
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
    return output


def measure(graph: Path, rounds: int, provider: str) -> dict[str, Any]:
    """Time the runner and what it runs by turns; milliseconds and microseconds a call."""
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with open_runner(graph, providers=[provider]) as runner:
        call = bare_call(runner, images)
        for _ in range(10):
            call()
            runner(images)
        pairs = [pair(call, lambda: runner(images)) for _ in range(rounds)]
    bare = [one for one, _ in pairs]
    ratios = [ours / one for one, ours in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "graph": graph.name,
        "rounds": rounds,
        "bare_ms": statistics.median(bare) * 1e3,
        "runner_ms": statistics.median(ours for _, ours in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "overhead_us": statistics.median(ours - one for one, ours in pairs) * 1e6,
    }


def pair(bare: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Time both once, in random order."""
    if random.random() < 0.5:  # noqa: S311  an order, not a secret
        first = clock(bare)
        return first, clock(ours)
    second = clock(ours)
    return clock(bare), second


def clock(call: Callable[[], object]) -> float:
    """Time one call in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bare_call(runner: Runner, images: np.ndarray) -> Callable[[], object]:
    """Call the session or compiled model that the runner itself uses, as its documentation does."""
    if hasattr(runner, "_compiled"):
        compiled = runner._compiled
        return lambda: compiled(images)
    session, feed = runner._session, {runner.inputs[0].name: images}  # type: ignore[attr-defined]
    names = [spec.name for spec in runner.outputs]
    return lambda: session.run(names, feed)


def machine() -> dict[str, Any]:
    """Name the machine and the versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions_of("onnxruntime-gpu", "onnxruntime", "openvino"),
        "instructions": this_machine().instructions,
        "numpy": np.__version__,
    }


def processor() -> str:
    """Read the processor's name; what the platform calls it where that is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


if __name__ == "__main__":
    main()
