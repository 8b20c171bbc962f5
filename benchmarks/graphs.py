"""Time vit-msn-base for a [CLS] embedding: our graphs beside optimum's and PyTorch's own.

    python benchmarks/graphs.py --optimum VENV/bin/optimum-cli [--rounds 40] [--threads 2]

One process, one input, a contender after the other in random order every round: a machine that is
busy for a while slows all of them. The ratio is the median of a round's ratios, by the clock and of
processor time, which a busy machine disturbs less. optimum-cli lives in an environment of its own
(benchmarks/peer.txt); without it its row is left out, and says so.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from forms import opened
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export import image_folder, images
from msn_export.host import this_machine
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "graphs.json"
BATCHES = (1, 8)
BASIS = ("optimum", "torch sdpa")
Contender = Callable[[np.ndarray], np.ndarray]
Times = tuple[float, float]  # milliseconds by the clock, and of the processor


def main() -> None:
    """Build the contenders, time them at both batch sizes, print ratios and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimum", type=Path, help="optimum-cli of its own environment")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: slow to start")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    told: dict[str, object] = {
        "machine": asdict(this_machine()),
        "threads": options.threads,
        "peak_gflops": peak(options.threads),
    }
    with tempfile.TemporaryDirectory() as name:
        pictures = photographs(Path(name) / "photographs")
        contenders = build(options, Path(name))
        for batch in BATCHES:
            rounds = options.rounds // (1 if batch == 1 else 2)
            told[f"batch {batch}"] = measure(contenders, pictures[:batch], rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")


def photographs(folder: Path) -> np.ndarray:
    """Write scikit-image's photographs, and decode as many as the largest batch takes."""
    run(sys.executable, str(ROOT / "scripts" / "photographs.py"), str(folder))
    preprocessing = preset("hf", ImageSize(224, 224))
    return images.normalize(
        image_folder.load(folder, preprocessing, max(BATCHES)).pixels, preprocessing
    )


def build(options: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """Make every contender of one set of weights, in Hugging Face's format."""
    torch.manual_seed(0)
    model = ViTMSNModel(ViTMSNConfig())
    model.save_pretrained(folder / "hf")
    own = folder / "own.onnx"
    export = ["onnx", str(folder / "hf"), "-o", str(own), "--target", "onnxruntime", "--no-check"]
    run(sys.executable, "-m", "msn_export", *export, "--head", "cls")
    found = {"msn-export": session(own, options.threads)}
    calibrate = ["calibrate", str(own), "--int8", "--no-compile", "--smooth", "off"]
    for name, base in (("msn-export int8", "fp32"), ("msn-export int8, the rest fp16", "fp16")):
        eight = folder / f"{base}.onnx"
        asked = ["--base", base, "--images", str(folder / "photographs"), "-o", str(eight)]
        run(sys.executable, "-m", "msn_export", *calibrate, *asked)
        found[name] = session(eight, options.threads)
    if options.optimum:
        task = ["--task", "feature-extraction", str(folder / "peer")]
        run(str(options.optimum), "export", "onnx", "--model", str(folder / "hf"), *task)
        found["optimum"] = session(folder / "peer" / "model.onnx", options.threads)
    else:
        print("optimum: left out, --optimum is not given", file=sys.stderr)
    exported = folder / "torch.onnx"
    run(
        sys.executable,
        str(Path(__file__).with_name("torch_export.py")),
        str(folder / "hf"),
        str(exported),
    )
    found["torch.onnx.export"] = session(exported, options.threads)
    for kind in ("sdpa", "eager"):
        loaded = ViTMSNModel.from_pretrained(folder / "hf", attn_implementation=kind)
        found[f"torch {kind}"] = of_torch(loaded)
        if kind == "sdpa" and options.compile:
            found["torch compile"] = of_torch(torch.compile(loaded))
    return found


def run(*command: str) -> None:
    """Run a command, and show what it said only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def session(path: Path, threads: int) -> Contender:
    """Open a graph in onnxruntime on the CPU; what it gives first is read at [CLS]."""
    graph = opened(path, threads)
    name = graph.get_inputs()[0].name

    def call(batch: np.ndarray) -> np.ndarray:
        output: np.ndarray = graph.run(None, {name: batch})[0]
        return output[:, 0] if output.ndim == 3 else output

    return call


def of_torch(model: Callable[..., Any]) -> Contender:
    """Run a model of transformers."""

    def call(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            hidden: torch.Tensor = model(torch.from_numpy(batch)).last_hidden_state
        return hidden[:, 0].numpy()

    return call


def measure(
    contenders: Mapping[str, Contender], batch: np.ndarray, rounds: int
) -> dict[str, object]:
    """Time all contenders by turns; medians, ratios, and how far outputs are apart."""
    wanted = contenders["torch sdpa"](batch)
    apart = {name: agreement(call(batch), wanted) for name, call in contenders.items()}
    times: dict[str, list[Times]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            started = time.perf_counter(), time.process_time()
            contenders[name](batch)
            ended = time.perf_counter(), time.process_time()
            times[name].append((1e3 * (ended[0] - started[0]), 1e3 * (ended[1] - started[1])))
    found: dict[str, object] = {"rounds": rounds}
    for name in times:
        found[name] = figures(times, name) | apart[name]
        print(f"batch {len(batch)}: {name}: {found[name]}", flush=True)
    return found


def peak(threads: int, side: int = 2048, calls: int = 12) -> dict[str, float]:
    """Measure what either library makes of one square product in fp32, at best: GFLOP/s."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, side, side)).astype(np.float32)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    text = f"g (float[{side},{side}] a, float[{side},{side}] b) => (float[{side},{side}] y)"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> {text} {{ y = MatMul (a, b) }}'
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    graph = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    work = {"onnxruntime": lambda: graph.run(None, {"a": a, "b": b}), "torch": lambda: x @ y}
    return {
        name: round(2 * side**3 / min(seconds_of(call) for _ in range(calls)) / 1e9, 1)
        for name, call in work.items()
    }


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def agreement(output: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Compare embeddings [b, dim]: the largest difference, and the smallest cosine."""
    norms = np.linalg.norm(output, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (output * wanted).sum(axis=1) / norms
    return {"max_abs": float(np.abs(output - wanted).max()), "cosine": float(cosines.min())}


def figures(times: Mapping[str, list[Times]], name: str) -> dict[str, object]:
    """Take medians, by the clock and of the processor, and medians of the ratios of a round."""
    taken, found = times[name], dict[str, object]()
    for index, clock in enumerate(("wall", "cpu")):
        found[f"{clock}_ms"] = round(statistics.median(one[index] for one in taken), 1)
        for basis in BASIS:
            if basis in times:
                pairs = zip(taken, times[basis], strict=True)
                ratio = statistics.median(a[index] / b[index] for a, b in pairs)
                found[f"{clock} x {basis}"] = round(ratio, 3)
    return found


if __name__ == "__main__":
    main()
