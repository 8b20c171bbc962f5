"""Take the mean error of quantising out of each projection's bias.

Nagel et al., "Data-Free Quantization", arXiv 1906.04721, section 4.2, with measured instead of
assumed means: a product is linear, so the mean of its error is the error of the means, and one
pass over the fp32 graph's inputs serves all blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.collect import Watch, finite
from msn_export.calibration.formats import scales
from msn_export.calibration.projections import Projection, Role
from msn_export.calibration.qdq import Scheme
from msn_export.graph.patch import Patch


def corrections(
    model: ir.Model,
    projections: Sequence[Projection],
    thresholds: Mapping[str, float],
    scheme: Scheme,
    watch: Watch,
    batches: Iterable[tuple[NDArray[Any], Sequence[str]]],
) -> dict[str, NDArray[np.float32]]:
    """Measure what each projection's output [.., c] is off by on average, by its node's name.

    Args:
        model: the fp32 graph, smoothed.
        projections: what will be quantised; convolutions are left out.
        thresholds: the largest value represented, by input.
        scheme: format and base type.
        watch: watches the inputs of ``projections``.
        batches: the images to measure on.
    """
    linear = [p for p in projections if p.role is not Role.PATCH]
    steps = {p.x: scales(thresholds[p.x], scheme.form, scheme.base) for p in linear}
    exact, rounded = _means(steps, scheme, watch, batches)
    found = {}
    for projection in linear:
        weight = model.graph.initializers[projection.weight].const_value
        assert weight is not None
        columns = np.moveaxis(weight.numpy(), projection.axis, -1)  # [in, out]
        held = scales(np.abs(columns).max(axis=0), scheme.weights, scheme.base)
        carried = scheme.weights.carry(columns, held).astype(np.float64)
        error = rounded[projection.x] @ carried - exact[projection.x] @ columns
        found[projection.node] = error.astype(np.float32)
    return found


def _means(
    steps: Mapping[str, NDArray[np.float32]],
    scheme: Scheme,
    watch: Watch,
    batches: Iterable[tuple[NDArray[Any], Sequence[str]]],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Take each channel's mean as it is, and as its input's steps carry it."""
    exact: dict[str, Any] = dict.fromkeys(steps, 0.0)
    rounded: dict[str, Any] = dict.fromkeys(steps, 0.0)
    rows = dict.fromkeys(steps, 0)
    for images, labels in batches:
        for name, values in finite(watch(images), labels).items():
            if name in steps:
                flat = values.reshape(-1, values.shape[-1])
                carried = scheme.form.carry(flat, steps[name])
                exact[name] = exact[name] + flat.sum(axis=0, dtype=np.float64)
                rounded[name] = rounded[name] + carried.sum(axis=0, dtype=np.float64)
                rows[name] += len(flat)
    return (
        {name: exact[name] / rows[name] for name in steps},
        {name: rounded[name] / rows[name] for name in steps},
    )


def correct(model: ir.Model, errors: Mapping[str, NDArray[np.float32]]) -> None:
    """Subtract the errors from the biases, in place; a projection without one keeps its error."""
    for node in [node for node in model.graph if node.name in errors]:
        error = errors[node.name or ""]
        uses = node.outputs[0].uses()
        reader = next(iter(uses)).node if len(uses) == 1 else None
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            _subtract(model, node, 2, error)
        elif reader is not None and reader.op_type == "Add" and _bias_index(reader) is not None:
            _subtract(model, reader, _bias_index(reader) or 0, error)


def _bias_index(node: ir.Node) -> int | None:
    return next((i for i, v in enumerate(node.inputs) if v is not None and v.const_value), None)


def _subtract(model: ir.Model, node: ir.Node, index: int, error: NDArray[np.float32]) -> None:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    corrected = value.const_value.numpy() - error
    patch = Patch(model.graph, node)
    node.replace_input_with(index, patch.constant(corrected, f"{value.name}.corrected"))
