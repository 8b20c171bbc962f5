"""Time vit-msn-base for a [CLS] embedding: our graphs beside optimum's and PyTorch's own.

    python benchmarks/graphs.py --optimum VENV/bin/optimum-cli [--rounds 40] [--threads 2]

Our graphs run in onnxruntime and in OpenVINO through the runtime; one also in OpenVINO with nothing
around it, which shows what the runner adds. One process a contender (graphs_contender.py), stopped
while another has its turn: the threads of a pool spin for a while after a call. A contender after
the other in random order every round, so that a machine that is busy for a while slows all of them.
The ratio is the median of a round's ratios, by the clock and of processor time, which a busy machine
disturbs less. The results name the processor's instruction sets. optimum-cli lives in an environment
of its own (benchmarks/peer.txt); without it its row is left out, and says so. ``--blocks 1`` makes a
model of one block, to try the script.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export import image_folder, images
from msn_export.host import this_machine
from msn_export.manifest import versions_of
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "graphs.json"
BATCHES = (1, 8)
BASIS = ("optimum", "torch sdpa", "msn-export", "msn-export int8", "bare OpenVINO")
BARE = "bare OpenVINO"
Times = tuple[float, float]  # milliseconds by the clock, and of the processor


class Contender:
    """A process that runs one contender; it is stopped whenever nobody waits for it."""

    def __init__(self, spec: Mapping[str, Any], log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("graphs_contender.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._log = log
        self.runs: str = self._ask(spec)["runs"]

    def outputs(self, images: Path, folder: Path) -> np.ndarray:
        """Take images as the batch of the calls to come, and give their embeddings."""
        self._ask({"images": str(images), "outputs": str(folder / "outputs.npy")})
        found: np.ndarray = np.load(folder / "outputs.npy")
        return found

    def times(self, calls: int) -> list[Times]:
        """Take a turn."""
        return [(wall, cpu) for wall, cpu in self._ask({"calls": calls})["milliseconds"]]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"a contender failed: {message}\n{self._log.read_text()[-2000:]}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """Build the contenders, time them at both batch sizes, print ratios and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimum", type=Path, help="optimum-cli of its own environment")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: slow to start")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=1, help="that are timed in a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    told: dict[str, object] = {
        "machine": asdict(this_machine()),
        "versions": versions_of("onnxruntime-gpu", "onnxruntime", "openvino", "torch"),
        "threads": options.threads,
        "peak_gflops": peak(options.threads),
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        pictures = photographs(Path(name) / "photographs")
        contenders = {}
        for title, spec in build(options, Path(name)).items():
            spec["threads"] = options.threads
            contenders[title] = Contender(spec, Path(name) / "log.txt")
            stack.callback(contenders[title].close)
        told["runs"] = {title: one.runs for title, one in contenders.items()}
        for batch in BATCHES:
            rounds = max(1, options.rounds // (1 if batch == 1 else 2))
            told[f"batch {batch}"] = measure(
                contenders, pictures[:batch], rounds, options.calls, Path(name)
            )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")


def photographs(folder: Path) -> np.ndarray:
    """Write scikit-image's photographs, and decode as many as the largest batch takes."""
    run(sys.executable, str(ROOT / "scripts" / "photographs.py"), str(folder))
    preprocessing = preset("hf", ImageSize(224, 224))
    return images.normalize(
        image_folder.load(folder, preprocessing, max(BATCHES)).pixels, preprocessing
    )


def build(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Make the files of every contender of one set of weights, in Hugging Face's format."""
    torch.manual_seed(0)
    model = ViTMSNModel(ViTMSNConfig(num_hidden_layers=options.blocks))
    model.save_pretrained(folder / "hf")
    own = folder / "own.onnx"
    export = ["onnx", str(folder / "hf"), "-o", str(own), "--target", "onnxruntime", "--no-check"]
    run(sys.executable, "-m", "msn_export", *export, "--head", "cls")
    found = {"msn-export": graph(own)}
    calibrate = ["calibrate", str(own), "--int8", "--no-compile", "--smooth", "off"]
    for name, base in (("msn-export int8", "fp32"), ("msn-export int8, the rest fp16", "fp16")):
        eight = folder / f"{base}.onnx"
        asked = ["--base", base, "--images", str(folder / "photographs"), "-o", str(eight)]
        run(sys.executable, "-m", "msn_export", *calibrate, *asked)
        found[name] = graph(eight)
    found["msn-export, OpenVINO"] = graph(own, "openvino")
    if "avx512_bf16" in this_machine().instructions or "amx_bf16" in this_machine().instructions:
        found["msn-export, OpenVINO bf16"] = graph(own, "openvino", "bf16")
    found["msn-export int8, OpenVINO"] = graph(folder / "fp32.onnx", "openvino")
    found[BARE] = {"kind": "openvino", "path": str(own)}
    if options.optimum:
        task = ["--task", "feature-extraction", str(folder / "peer")]
        run(str(options.optimum), "export", "onnx", "--model", str(folder / "hf"), *task)
        found["optimum"] = {"kind": "onnxruntime", "path": str(folder / "peer" / "model.onnx")}
    else:
        print("optimum: left out, --optimum is not given", file=sys.stderr)
    exported = folder / "torch.onnx"
    run(
        sys.executable,
        str(Path(__file__).with_name("torch_export.py")),
        str(folder / "hf"),
        str(exported),
    )
    found["torch.onnx.export"] = {"kind": "onnxruntime", "path": str(exported)}
    for name, attention, dtype, compiled in (
        ("torch sdpa", "sdpa", "fp32", False),
        ("torch bf16", "sdpa", "bf16", False),
        ("torch compile", "sdpa", "fp32", True),
        ("torch eager", "eager", "fp32", False),
    ):
        if options.compile or not compiled:
            found[name] = {
                "kind": "torch", "path": str(folder / "hf"), "attention": attention,
                "dtype": dtype, "compiled": compiled,
            }  # fmt: skip
    return found


def graph(path: Path, provider: str = "cpu", precision: str | None = None) -> dict[str, Any]:
    """Describe a graph that runs through the runtime."""
    return {"kind": "runner", "path": str(path), "provider": provider, "precision": precision}


def run(*command: str) -> None:
    """Run a command, and show what it said only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def measure(
    contenders: Mapping[str, Contender], batch: np.ndarray, rounds: int, calls: int, folder: Path
) -> dict[str, object]:
    """Time all contenders by turns; medians, ratios, and how far outputs are apart."""
    np.save(folder / "images.npy", batch)
    outputs = {name: one.outputs(folder / "images.npy", folder) for name, one in contenders.items()}
    apart = {name: agreement(output, outputs["torch sdpa"]) for name, output in outputs.items()}
    times: dict[str, list[Times]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            turn = contenders[name].times(calls)
            wall, cpu = (statistics.median(one[index] for one in turn) for index in (0, 1))
            times[name].append((wall, cpu))
    found: dict[str, object] = {"rounds": rounds, "calls": calls}
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
