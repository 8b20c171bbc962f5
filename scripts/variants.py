"""Export and compile the five published shapes, and write docs/variants.md.

    python scripts/variants.py demo/photographs

Weights are seeded random numbers: size, time, memory and the engine's kernels do not depend on
them. About half an hour on two cores, most of it for the two shapes with small patches.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VARIANTS = (
    "vit-msn-small",
    "vit-msn-base",
    "vit-msn-large",
    "vit-msn-base-4",
    "vit-msn-large-7",
)
BATCH = {"vit-msn-base-4": "1:2:4", "vit-msn-large-7": "1:4:8"}
TARGET = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")


def run(*arguments: str) -> dict[str, Any]:
    """Run one command with --json and give what it printed."""
    command = [sys.executable, "-m", "msn_export", *arguments, "--json"]
    print(" ".join(("msn-export", *arguments)), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def measure(variant: str, pictures: Path, folder: Path) -> str:
    """Export and compile one shape; give its row of the table."""
    graph, engine = folder / f"{variant}.onnx", folder / f"{variant}.engine"
    batch = BATCH.get(variant, "1:8:32")
    shared = ("--images", str(pictures), "--force")
    made = run(
        "onnx", f"random:{variant}:0", "--head", "tokens", "--batch", batch, "-o", str(graph),
        *shared,
    )  # fmt: skip
    built = run("trt", str(graph), "--fp16", *TARGET, "-o", str(engine), *shared)
    for path in (graph, engine):
        path.unlink()
    check, compiled = built["check"], built["engine"]
    gemms = ", ".join(f"{n} {dtype}" for dtype, n in compiled["gemm_dtypes"].items())
    cells = (
        variant,
        made["config"]["depth"],
        made["outputs"][0]["shape"][1],
        batch,
        f"{made['bytes'] / 1e6:.0f}",
        f"{made['seconds']:.0f}",
        f"{made['peak_rss_bytes'] / 1e9:.1f}",
        f"{made['check']['max_abs']:.1e}",
        f"{built['bytes'] / 1e6:.0f}",
        f"{built['seconds']:.0f}",
        f"{built['peak_rss_bytes'] / 1e9:.1f}",
        f"{check['cosine_p1']:.6f}",
        compiled["kernels"],
        f"{compiled['fused_attention']}/{built['attention']['expected']}",
        gemms,
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEAD = """# The five published shapes

Each shape was exported (fp32, `--head tokens`) and compiled (`--fp16`, SM 8.9, TensorRT-RTX {rtx}), with
checks on 16 photographs, on {machine}. Command:

    python scripts/variants.py demo/photographs

Weights are seeded random numbers. The fp32 graph is compared with the PyTorch reference (gate:
max_abs ≤ 1e-4), the fp16 graph with the fp32 graph (gate: p1 cosine ≥ 0.999). The kernels of the engines
were counted; without a GPU the engines did not run. Seconds and memory (peak resident, of the larger
process) are for the whole command with its check.

| shape | blocks | tokens | batch | ONNX MB | s | GB | max_abs | engine MB | s | GB | p1 cosine | kernels | fused | matrix products |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(pictures: Path) -> None:
    """Measure all shapes and write the page."""
    import tensorrt_rtx

    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(variant, pictures, Path(folder)) for variant in VARIANTS]
    machine = f"two cores of an {cpu}, Python {platform.python_version()}"
    page = HEAD.format(rtx=tensorrt_rtx.__version__, machine=machine) + "\n".join(rows) + "\n"
    Path("docs/variants.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
