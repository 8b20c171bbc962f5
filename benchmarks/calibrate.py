"""Time ``msn-export calibrate`` of a shape over 15 photographs, beside the same of another commit.

    python benchmarks/calibrate.py --base COMMIT [--rounds 5] [--dtype fp8] [--variant vit-msn-base]

Whole commands with their default options, one process a run: the contenders in random order every
round, with a pause before each. Wall time, processor time of the command and the compiler that it
starts, and peak resident memory, as the kernel counts them; the ratios are medians of a round's. The
results name the processor's instruction sets, the seconds of each step, and what was decided: it ends
with an error where the two chose another smoothing or kept other blocks. COMMIT is checked out into a
folder of its own and runs with the packages that are installed here.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msn_export.host import this_machine
from msn_export.manifest import versions_of

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "calibrate.json"
PICTURES = 15
_STEP = re.compile(r"^ *([0-9.]+) s  (.+)$", re.MULTILINE)  # as the progress on stderr writes them
Figures = dict[str, float]


def main() -> None:
    """Run both by turns, print medians and ratios, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, metavar="COMMIT")
    parser.add_argument("--variant", default="vit-msn-small")
    parser.add_argument("--dtype", choices=("int8", "fp8"), default="int8")
    parser.add_argument("--no-compile", action="store_true", help="TensorRT-RTX left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs, graph = prepare(folder, options.variant)
        base = check_out(options.base, folder / "base")
        command = [sys.executable, "-m", "msn_export", "calibrate", str(graph), "--json", "--force",
                   f"--{options.dtype}", "--images", str(photographs)]  # fmt: skip
        command += ["--no-compile"] if options.no_compile else []
        contenders = {"base": {**os.environ, "PYTHONPATH": str(base)}, "this": {**os.environ}}
        runs: dict[str, list[Figures]] = {who: [] for who in contenders}
        decided: dict[str, dict[str, Any]] = {}
        steps: dict[str, dict[str, float]] = {}
        order = list(contenders)
        for _ in range(options.rounds):
            random.shuffle(order)
            for who in order:
                time.sleep(options.pause)
                output = folder / f"{who}.onnx"
                found, told, log = measure([*command, "-o", str(output)], contenders[who], folder)
                runs[who].append(found)
                decided[who] = decision(told)
                steps[who] = {title: float(seconds) for seconds, title in _STEP.findall(log)}
                print(who, found, file=sys.stderr, flush=True)
    medians = {
        who: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for who, found in runs.items()
    }
    ratios = {
        key: statistics.median(
            a[key] / b[key] for a, b in zip(runs["this"], runs["base"], strict=True)
        )
        for key in medians["this"]
    }
    result = {
        "variant": options.variant, "dtype": options.dtype, "compiled": not options.no_compile,
        "pictures": PICTURES, "base": options.base, "machine": asdict(this_machine()),
        "versions": versions_of("onnxruntime-gpu", "onnxruntime", "tensorrt-rtx", "numpy"),
        "load": os.getloadavg(), "medians": medians, "ratios": ratios, "decided": decided,
        "steps": steps, "runs": runs,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for who, figures in medians.items():
        print(f"{who:6}", *(f"{key} {value:7.2f}" for key, value in figures.items()), sep="  ")
    print("ratio ", *(f"{key} x {value:5.2f}" for key, value in ratios.items()), sep="  ")
    choices = [
        {key: one[key] for key in ("smoothing", "kept", "products")} for one in decided.values()
    ]
    if choices[0] != choices[1]:
        raise SystemExit(f"the two decided otherwise: {decided}")


def prepare(folder: Path, variant: str) -> tuple[Path, Path]:
    """Write the photographs, and export the graph that both calibrate."""
    found, photographs = folder / "found", folder / "photographs"
    script = ROOT / "scripts" / "photographs.py"
    subprocess.run([sys.executable, str(script), str(found)], check=True, stdout=sys.stderr)
    photographs.mkdir()
    for path in sorted(found.iterdir())[:PICTURES]:
        shutil.copy(path, photographs)
    graph = folder / "model.onnx"
    export = ["onnx", f"random:{variant}:0", "--no-check", "-o", str(graph)]
    subprocess.run(
        [sys.executable, "-m", "msn_export", *export], check=True, stdout=subprocess.DEVNULL
    )
    return photographs, graph


def check_out(commit: str, folder: Path) -> Path:
    """Write a commit's packages as they are installed; give the folder for PYTHONPATH."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", commit, "exporter", "models", "calibration"],
        check=True, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=archive.stdout)
    (folder / "exporter").rename(folder / "msn_export")
    for name in ("models", "calibration"):
        (folder / name).rename(folder / "msn_export" / name)
    return folder


def measure(
    command: list[str], environment: Mapping[str, str], folder: Path
) -> tuple[Figures, dict[str, Any], str]:
    """Run to the end: its figures, the manifest that it prints, and what it logged."""
    started = time.monotonic()
    with (folder / "told.json").open("wb") as told, (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=told, stderr=log, env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (folder / "log.txt").read_text()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    manifest = json.loads((folder / "told.json").read_text())
    figures = {
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_gb": manifest["peak_rss_bytes"] / 1e9,
    }
    return figures, manifest, said


def decision(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what was decided, and how good the graph is."""
    record, check = manifest["quantization"], manifest["check"]
    return {
        "smoothing": record["smoothing"],
        "smoothing_errors": record["smoothing_errors"],
        "kept": record["kept"],
        "products": record["products"],
        "cosine_p1": check["cosine_p1"],
        "relative": check["relative"],
        "sha256": manifest["sha256"],
    }


if __name__ == "__main__":
    main()
