"""Count what folding one constant into another brings: nodes, kernels, and that outputs stay.

    python benchmarks/foldings.py

Each folding is done on the exported graph's weights. Kernels: fp16, TensorRT-RTX for SM 8.9. The
[CLS] token is folded into its position by the exporter itself (msn_export.graph.torch_reference).
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from forms import kernels, opened, traced

from msn_export.graph import io
from msn_export.graph.fuse import fuse_attention
from msn_export.models.checkpoint import load_checkpoint
from msn_export.spec import AttentionForm, Head

RESULTS = Path(__file__).parent / "results" / "foldings.json"
VARIANT = "random:vit-msn-small:0"


def main() -> None:
    """Try each folding by itself, print a table and write JSON."""
    module = load_checkpoint(VARIANT).model
    # seeded initial biases are zero, which would hide a mistake
    generator = np.random.default_rng(0)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        path, wanted = Path(name) / "m.onnx", None
        shape = (1, *module.config.image_size, 3)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        noise: dict[str, np.ndarray] = {}
        for label, fold in FOLDINGS.items():
            model = traced(module, Head.TOKENS)
            fuse_attention(model, AttentionForm.HEADS)
            for weight, value in model.graph.initializers.items():
                if weight.endswith(".bias"):
                    noise.setdefault(weight, 0.1 * generator.standard_normal(value.shape.numpy()))  # type: ignore[union-attr]
                    put(value, noise[weight])
            fold(model)
            io.save(model, path)
            (output,) = opened(path).run(None, {"images": images})
            wanted = output if wanted is None else wanted
            count, _ = kernels(model, Path(name))
            moved = float(np.abs(output - wanted).max())
            found[label] = {"nodes": len(model.graph), "kernels": count, "moved": moved}
            print(f"| {label} | {len(model.graph)} | {count} | {moved:.1e} |", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


def put(value: ir.Value, array: np.ndarray) -> None:
    """Change a weight."""
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)


def held(model: ir.Model, name: str) -> np.ndarray:
    """Read a weight, to change."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def patch_bias(model: ir.Model) -> None:
    """Add the patch convolution's bias to every position but [CLS]'s."""
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert conv.inputs[2] is not None
    bias = held(model, str(conv.inputs[2].name))
    table = held(model, "pos_embed")
    table[:, 1:] += bias
    put(model.graph.initializers["pos_embed"], table)
    conv.resize_inputs(2)


def scale(model: ir.Model) -> None:
    """Multiply the queries' weights by 1 / sqrt(d), d 64, and let attention multiply by one."""
    for weight in [name for name in model.graph.initializers if ".attn.qkv." in name]:
        array = held(model, weight)
        array[..., : array.shape[-1] // 3] *= 64**-0.5
        put(model.graph.initializers[weight], array)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def key_bias(model: ir.Model) -> None:
    """Drop the keys' biases: they add the same to all scores of a query."""
    for name in [name for name in model.graph.initializers if name.endswith(".attn.qkv.bias")]:
        array = held(model, name)
        array[array.size // 3 : 2 * array.size // 3] = 0
        put(model.graph.initializers[name], array)


def value_bias(model: ir.Model) -> None:
    """Move the values' biases through the output projection: probabilities sum to one."""
    for name in [name for name in model.graph.initializers if name.endswith(".attn.qkv.bias")]:
        block = name.removesuffix("qkv.bias")
        array, bias = held(model, name), held(model, f"{block}proj.bias")
        third = array.size // 3
        bias += array[2 * third :] @ held(model, f"{block}proj.weight")
        array[2 * third :] = 0
        put(model.graph.initializers[name], array)
        put(model.graph.initializers[f"{block}proj.bias"], bias)


FOLDINGS: dict[str, Callable[[ir.Model], None]] = {
    "as exported": lambda _: None,
    "patch bias into the positions": patch_bias,
    "attention scale into the query weights": scale,
    "key bias dropped": key_bias,
    "value bias into the output projection's": value_bias,
}


if __name__ == "__main__":
    main()
