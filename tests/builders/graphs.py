"""Graphs small enough to see, in ONNX's text form, and one way to run them."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

HEAD = '<ir_version: {ir}, opset_import: ["" : {opset}]>\n'


def parse(text: str, *, opset: int = 23, ir_version: int = 10) -> ir.Model:
    """Read ONNX text with its constants as initializers, as every loader here gives them."""
    proto = onnx.parser.parse_model(HEAD.format(ir=ir_version, opset=opset) + text)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    model = ir.from_proto(inferred)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}{index}"
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Run the first output in onnxruntime, its own optimiser off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    output: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return output


def random_feeds(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Draw normal inputs; a dynamic size is 2."""
    generator = np.random.default_rng(seed)
    return {
        value.name or "": generator.standard_normal(
            [size if isinstance(size, int) else 2 for size in value.shape or ()]
        ).astype(np.float32 if value.dtype is None else value.dtype.numpy())
        for value in model.graph.inputs
    }


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
