"""Compare the speed of ``msn-export embed`` with what its two parts take by themselves.

    python benchmarks/embed_speed.py [MODEL.onnx PICTURES/] [--count 400] [--threads 2]

Without arguments the model is vit-msn-small with random weights and [CLS] output, and the pictures are
scikit-image's photographs.

For onnxruntime and OpenVINO, and with ``--bf16`` for OpenVINO in bf16: seconds an image of ``embed``
over ``seconds of decoding an image / cores + seconds of the bare model an image``. Nothing can be
faster than the larger of the two parts where there are idle cores, and on few cores nothing faster
than their sum. ``embed`` runs over a folder of copies and over one twice as large; the difference
leaves its start out. Each round times decoding, the bare model and ``embed`` one after the other, for
the runtimes in random order; the ratio is the median of the rounds' ratios. Writes
benchmarks/results/embed_speed.json.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from msn_export.embedding.decode import read
from msn_export.host import this_machine, usable_cores
from msn_export.manifest import versions_of
from msn_export.preprocessing import Preprocessing
from msn_export.runtime import open_runner

RESULTS = Path(__file__).parent / "results" / "embed_speed.json"


def small(path: Path) -> Path:
    """Export vit-msn-small as a server on a CPU would take it."""
    command = [
        sys.executable,
        "-m",
        "msn_export",
        "onnx",
        "random:vit-msn-small:0",
        "-o",
        str(path),
    ]
    command += ["--target", "onnxruntime", "--head", "cls", "--no-check"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def folder_of_photographs(folder: Path) -> Path:
    """Write scikit-image's photographs."""
    script = Path(__file__).parent.parent / "scripts" / "photographs.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def make_folder(photographs: Path, folder: Path, count: int) -> Path:
    """Fill a folder with copies of photographs."""
    folder.mkdir()
    sources = sorted(path for path in photographs.iterdir() if path.is_file())
    for number in range(count):
        source = sources[number % len(sources)]
        (folder / f"{number:05}{source.suffix}").write_bytes(source.read_bytes())
    return folder


def decoding(folder: Path, preprocessing: Preprocessing) -> float:
    """Decode every picture in one process; seconds an image."""
    paths = sorted(folder.iterdir())
    read(paths[0], preprocessing)
    started = time.perf_counter()
    for path in paths:
        read(path, preprocessing)
    return (time.perf_counter() - started) / len(paths)


def bare_model(model: Path, options: dict[str, Any], calls: int) -> tuple[float, str, int]:
    """Run the model alone at the batch of ``embed``; median seconds an image."""
    with open_runner(model, **options) as runner:
        preprocessing = runner.manifest.preprocessing if runner.manifest else None
        assert preprocessing is not None
        spec, batch = runner.inputs[0], runner.batch.opt
        drawn = np.random.default_rng(0)
        if spec.dtype == "uint8":
            given = drawn.integers(0, 256, (batch, *spec.shape[1:]), np.uint8)
        else:
            given = drawn.standard_normal((batch, *spec.shape[1:])).astype(np.float32)
        times = []
        for _ in range(calls + 2):
            started = time.perf_counter()
            # as embed runs it: where the runtime can, several batches at a time
            for _outputs in runner.map([given] * 4):
                pass
            times.append((time.perf_counter() - started) / (4 * batch))
        return statistics.median(times[2:]), f"{runner.name}; {runner.precision or ''}", batch


def embedding(model: Path, folder: Path, output: Path, options: list[str]) -> float:
    """Run the command; its seconds."""
    command = [sys.executable, "-m", "msn_export", "embed", str(model), str(folder), "-o"]
    done = subprocess.run(
        [*command, str(output), "--json", "--force", *options],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return float(json.loads(done.stdout)["seconds"])


def timed(
    model: Path,
    options: dict[str, Any],
    preprocessing: Preprocessing,
    folders: tuple[Path, Path],
    calls: int,
) -> dict[str, Any]:
    """Time the parts and the whole once: milliseconds an image, and the ratio."""
    few, many = folders
    count = len(list(few.iterdir()))
    decode = 1e3 * decoding(few, preprocessing)
    bare, runs, batch = bare_model(model, options, calls)
    asked = ["--providers", options["providers"][0]]
    asked += ["--precision", "bf16"] if options.get("precision") else []
    asked += ["--threads", str(options["threads"])] if options["threads"] else []
    output = few.parent / "out.npy"
    seconds = [embedding(model, folder, output, asked) for folder in (few, many)]
    whole = 1e3 * (seconds[1] - seconds[0]) / count
    parts = decode / len(usable_cores()) + 1e3 * bare
    return {
        "runs": runs, "batch": batch, "decode_ms": decode, "model_ms": 1e3 * bare,
        "embed_ms": whole, "ratio": whole / parts,
    }  # fmt: skip


def main() -> None:
    """Time the parts and the whole for each runtime, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10, help="of the bare model in a round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    runtimes: dict[str, dict[str, Any]] = {
        "onnxruntime": {"providers": ["cpu"]},
        "OpenVINO": {"providers": ["openvino"], "hint": "throughput"},
    }
    if given.bf16:
        runtimes["OpenVINO bf16"] = {**runtimes["OpenVINO"], "precision": "bf16"}
    found: dict[str, Any] = {
        "model": given.model.name if given.model else "vit-msn-small",
        "count": given.count,
        "machine": asdict(this_machine()),
        "versions": versions_of("onnxruntime-gpu", "onnxruntime", "openvino", "pillow"),
        "load": Path("/proc/loadavg").read_text().split()[0],
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in runtimes}
    with tempfile.TemporaryDirectory() as held:
        scratch = Path(held)
        model = given.model or small(scratch / "vit-msn-small.onnx")
        photographs = given.photographs or folder_of_photographs(scratch / "photographs")
        with open_runner(model, providers=["cpu"]) as runner:
            assert runner.manifest is not None
            preprocessing = runner.manifest.preprocessing
            assert preprocessing is not None
        few = make_folder(photographs, scratch / "few", given.count)
        many = make_folder(photographs, scratch / "many", 2 * given.count)
        for _ in range(given.rounds):
            for name in random.sample(list(runtimes), len(runtimes)):
                options = runtimes[name] | {"threads": given.threads}
                one = timed(model, options, preprocessing, (few, many), given.calls)
                rounds[name].append(one)
                print(f"{name}: {one}", flush=True)
    for name, of in rounds.items():
        figures = ("decode_ms", "model_ms", "embed_ms", "ratio")
        medians = {figure: statistics.median(one[figure] for one in of) for figure in figures}
        about = {key: of[0][key] for key in ("runs", "batch")}
        found[name] = about | {key: round(value, 3) for key, value in medians.items()}
        found[name]["rounds"] = of
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
