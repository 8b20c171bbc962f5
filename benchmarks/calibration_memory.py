"""Measure what calibrating on more images takes: peak memory with 32 and with 512 of them.

    python benchmarks/calibration_memory.py [--json FILE]

Both runs are ``msn-export calibrate --int8`` of a random vit-msn-small over the same folder, 640
seeded crops of the photographs that ship inside scikit-image, 64 of them held out; ``--limit``
alone differs. The peak is the process' own, as its manifest says it. About five minutes on two cores.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "calibration_memory.json"
LIMITS = (32, 512)
PICTURES = 640
ALLOWED = 300e6  # bytes between the two peaks


def main() -> None:
    """Run both, print the peaks and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = crops(folder)
        graph = folder / "vit-msn-small.onnx"
        command("onnx", "random:vit-msn-small:0", "--no-check", "-o", str(graph))
        runs = [calibrate(graph, pictures, limit) for limit in LIMITS]
    apart = runs[-1]["peak_rss_bytes"] - runs[0]["peak_rss_bytes"]
    told = {
        "runs": runs,
        "apart_bytes": apart,
        "allowed_bytes": int(ALLOWED),
        "machine": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")
    for run in runs:
        print(
            f"{run['images']} images: peak {run['peak_rss_bytes'] / 1e6:.0f} MB, "
            f"{run['seconds']:.0f} s"
        )
    print(f"{apart / 1e6:+.0f} MB for {LIMITS[1] // LIMITS[0]} times the images")
    if apart > ALLOWED:
        raise SystemExit(f"more than {ALLOWED / 1e6:.0f} MB apart")


def crops(folder: Path) -> Path:
    """Cut seeded squares out of the photographs; no two are the same."""
    script = Path(__file__).parent.parent / "scripts" / "photographs.py"
    photographs = folder / "photographs"
    subprocess.run([sys.executable, str(script), str(photographs)], check=True)
    opened = [Image.open(path).convert("RGB") for path in sorted(photographs.iterdir())]
    pictures = folder / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        picture = opened[number % len(opened)]
        side = int(generator.integers(min(picture.size) // 2, min(picture.size) + 1))
        left, top = (int(generator.integers(0, size - side + 1)) for size in picture.size)
        crop = picture.crop((left, top, left + side, top + side)).resize((256, 256))
        crop.save(pictures / f"{number:03}.png")
    return pictures


def calibrate(graph: Path, pictures: Path, limit: int) -> dict[str, Any]:
    """Calibrate on ``limit`` images in a process of its own; give what its manifest says."""
    output = graph.with_name(f"{limit}.onnx")
    options = ["--int8", "--images", str(pictures), "--limit", str(limit), "--no-compile"]
    told = json.loads(command("calibrate", str(graph), "-o", str(output), *options))
    return {
        "images": told["quantization"]["calibration_images"],
        "held_out": len(told["quantization"]["held_out"]),
        "peak_rss_bytes": told["peak_rss_bytes"],
        "seconds": told["seconds"],
        "cosine_p1": told["check"]["cosine_p1"],
    }


def command(*arguments: str) -> str:
    """Run msn-export with ``--json``; give its stdout."""
    program = str(Path(sys.executable).with_name("msn-export"))
    run = subprocess.run(
        [program, *arguments, "--json"], check=True, capture_output=True, text=True
    )
    return run.stdout


if __name__ == "__main__":
    main()
