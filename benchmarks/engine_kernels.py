"""Count the kernels of the fp16 engines that graphs of several exporters become.

    python benchmarks/engine_kernels.py --optimum VENV/bin/optimum-cli

vit-msn-small with random weights. The graphs of ``msn-export onnx``, of optimum and of ``torch.onnx.export`` get their fp16
types from the same pass. TensorRT-RTX then compiles each as it is, for SM 8.9, without a GPU: a count, and no time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from forms import kernels
from transformers import ViTImageProcessorPil, ViTMSNConfig, ViTMSNModel

from msn_export import export
from msn_export.engine.options import find_backend
from msn_export.graph import io
from msn_export.graph.summary import macs

RESULTS = Path(__file__).parent / "results" / "kernels.json"
OURS: dict[str, dict[str, Any]] = {
    "msn-export, tokens": {"heads": ["tokens"]},
    "msn-export, [CLS]": {"heads": ["cls"]},
    "msn-export, [CLS], target onnxruntime": {"heads": ["cls"], "target": "onnxruntime"},
}


def main() -> None:
    """Write the graph of each exporter, compile it, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimum", type=Path, required=True, help="optimum-cli of its own venv")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for who, path in graphs(Path(name), options.optimum).items():
            model = io.load(path)
            close_axes(model)
            facts: dict[str, Any] = {
                "nodes": len(model.graph),
                "multiply_adds": macs(model) or None,
            }
            facts["kernels"], facts["fused"] = kernels(model, Path(name))
            found[who] = facts
            print(who, facts, flush=True)
    # None: sizes that a graph computes as it runs cannot be counted
    told = {"variant": "vit-msn-small", "compute_capability": "8.9", "dtype": "fp16"}
    told["compiler"] = str(find_backend("tensorrt-rtx"))
    options.json.write_text(json.dumps(told | {"graphs": found}, indent=2) + "\n")


def close_axes(model: ir.Model) -> None:
    """Fix all sizes but the batch, as ``trtexec --shapes`` does for optimum's graph."""
    (images,) = model.graph.inputs
    assert images.shape is not None
    if not isinstance(images.shape[2], int):
        images.shape = ir.Shape(["batch", 3, 224, 224])
        model.graph.outputs[0].shape = ir.Shape(["batch", 197, 384])


def graphs(folder: Path, optimum: Path) -> dict[str, Path]:
    """Export the same weights with each; give the files."""
    torch.manual_seed(0)
    config = ViTMSNConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    hf = folder / "hf"
    ViTMSNModel(config).save_pretrained(hf)
    ViTImageProcessorPil().save_pretrained(hf)
    written = {}
    for index, (who, options) in enumerate(OURS.items()):
        written[who] = export(hf, folder / f"{index}.onnx", check=False, **options).path
    theirs = [str(optimum), "export", "onnx", "--model", str(hf), "--task", "feature-extraction"]
    subprocess.run([*theirs, str(folder / "peer")], check=True, stdout=sys.stderr)
    script = Path(__file__).with_name("torch_export.py")
    subprocess.run([sys.executable, script, hf, folder / "torch.onnx"], check=True)
    return written | {
        "optimum": folder / "peer" / "model.onnx",
        "torch.onnx.export": folder / "torch.onnx",
    }


if __name__ == "__main__":
    main()
