"""Time ``msn-export onnx`` of vit-msn-base beside ``optimum-cli export onnx`` of the same folder.

    python benchmarks/export.py --optimum VENV/bin/optimum-cli [--rounds 3]

Ours checks its graph on 16 photographs (and runs without a check besides), optimum's on two random images,
torch.onnx.export not at all. Whole commands, each a process of its own that writes new files, in random order
every round, with a pause before each: wall time, processor time, and peak resident memory as the kernel counts
them.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import ViTImageProcessorPil, ViTMSNConfig, ViTMSNModel

from msn_export.host import this_machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "export.json"
Figures = dict[str, float]


def main() -> None:
    """Run both by turns, print medians and their ratio, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimum", type=Path, required=True, help="optimum-cli of its own venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        commands = prepare(Path(name), options.optimum)
        runs: dict[str, list[Figures]] = {who: [] for who in commands}
        for _ in range(options.rounds):
            for who, command in random.sample(list(commands.items()), len(commands)):
                time.sleep(options.pause)
                written = Path(name) / "written"
                shutil.rmtree(written, ignore_errors=True)  # to replace a file takes longer
                written.mkdir()
                runs[who].append(measure(command, Path(name) / f"{who}.log"))
                print(who, runs[who][-1], file=sys.stderr, flush=True)
    medians = {
        who: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for who, found in runs.items()
    }
    ratios = {
        who: {
            key: statistics.median(
                mine[key] / other[key] for mine, other in zip(found, runs["optimum"], strict=True)
            )
            for key in found[0]
        }
        for who, found in runs.items()
    }
    told = {"machine": asdict(this_machine()), "load": os.getloadavg(), "runs": runs}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(told | {"medians": medians, "ratios": ratios}, indent=2) + "\n"
    )
    for who, found in medians.items():
        row = (f"{key} {found[key]:6.2f} (x {ratios[who][key]:.2f})" for key in found)
        print(f"{who:24}", *row, sep="  ")


def prepare(folder: Path, optimum: Path) -> dict[str, list[str]]:
    """Write the checkpoint and the photographs; give each side's command."""
    torch.manual_seed(0)
    ViTMSNModel(ViTMSNConfig()).save_pretrained(folder / "hf")
    ViTImageProcessorPil().save_pretrained(folder / "hf")
    photographs = folder / "photographs"
    script = ROOT / "scripts" / "photographs.py"
    subprocess.run([sys.executable, str(script), str(photographs)], check=True, stdout=sys.stderr)
    model, written = str(folder / "hf"), folder / "written"
    ours = [sys.executable, "-m", "msn_export", "onnx", model, "-o", str(written / "m.onnx")]
    theirs = [str(optimum), "export", "onnx", "--model", model, "--task", "feature-extraction"]
    torchs = [sys.executable, str(Path(__file__).with_name("torch_export.py")), model]
    return {
        "msn-export": [*ours, "--images", str(photographs)],
        "msn-export --no-check": [*ours, "--no-check"],
        "optimum": [*theirs, str(written / "peer")],
        "torch.onnx.export": [*torchs, str(written / "torch.onnx")],
    }


def measure(command: list[str], log: Path) -> Figures:
    """Run to the end: seconds by the clock, seconds of processor, peak memory in GB."""
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    cpu = used.ru_utime + used.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_gb": used.ru_maxrss / 1e6}


if __name__ == "__main__":
    main()
