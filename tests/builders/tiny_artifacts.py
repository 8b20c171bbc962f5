"""A tiny classifier as an ONNX file with its manifest, and pictures enough for a folder."""

import zlib
from pathlib import Path

import numpy as np
import onnx
from click.testing import CliRunner
from onnx import TensorProto, helper
from PIL import Image

from msn_export.cli import main
from msn_export.runtime import open_runner
from tests.builders.checkpoints import hugging_face


def classifier(folder: Path, *options: str, heads: tuple[str, ...] = ("cls", "logits")) -> Path:
    """Export one with three classes; 32 pixels a side."""
    folder.mkdir(parents=True, exist_ok=True)
    hugging_face(folder / "checkpoint", labels=3)
    output = folder / "tiny.onnx"
    chosen = [f"--head={head}" for head in heads]
    arguments = ["onnx", str(folder / "checkpoint"), "-o", str(output), *chosen, *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return output


def pictures(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Write small seeded pictures in two folders; ``broken`` ones are cut short."""
    for number in range(count):
        rng = np.random.default_rng(number)
        path = folder / f"{'ab'[number % 2]}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[: 40 + zlib.crc32(path.name.encode()) % 40])
    return folder


def predicted(folder: Path, graph: Path, count: int, wrong: tuple[int, ...] = ()) -> Path:
    """Write plain pictures under the class that a graph takes them for; ``wrong`` under the next.

    So the graph's accuracy is known: that of random weights is chance.
    """
    for number in range(count):
        rng = np.random.default_rng(number)
        grain = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-20, 20, (40, 48, 3))
        path = folder / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path)
    with open_runner(graph) as runner:
        paths = sorted(folder.glob("*.png"))
        for number, row in enumerate(runner(paths).logits):
            name = runner.labels[(int(row.argmax()) + (number in wrong)) % len(row)]
            (folder / name).mkdir(exist_ok=True)
            paths[number].rename(folder / name / paths[number].name)
    return folder


def foreign(path: Path, shape: list[object], outputs: dict[str, int], *, bad: bool = False) -> Path:
    """Write a graph of another tool: the mean of each channel, repeated; NaN for dark pictures."""
    nodes = [helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"])]
    nodes.append(helper.make_node("Flatten", ["pooled"], ["means"]))
    if bad:
        nodes.append(helper.make_node("Log", ["means"], ["flat"]))  # NaN below zero
    else:
        nodes.append(helper.make_node("Identity", ["means"], ["flat"]))
    given = []
    for name, width in outputs.items():
        times = width // (shape[1] if isinstance(shape[1], int) else 3)
        nodes.append(helper.make_node("Concat", ["flat"] * times, [name], axis=1))
        given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", width]))
    taken = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [taken], given)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path
