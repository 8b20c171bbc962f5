"""A graph that can be quantised, with what was measured of it: from this, any mix of blocks.

Nagel et al., "Data-Free Quantization", arXiv 1906.04721, section 4.2, with measured instead of
assumed means: a product is linear, so the mean of its error is the error of the means, and one
pass over the fp32 graph's inputs serves all blocks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.qdq import (
    Operands,
    Projection,
    Role,
    Scheme,
    find_cores,
    find_operands,
    find_projections,
    quantise_attention,
    quantise_projections,
    require_fusable,
    scales,
)
from msn_export.calibration.ranges import Histogram, Watch, finite, threshold
from msn_export.errors import FusionError, GraphError
from msn_export.graph.builder import GraphBuilder, array_of, operand, sizes_of
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.opset import lower_opset
from msn_export.spec import AttentionForm, Dtype, Observer, Target


def corrections(
    model: ir.Model,
    projections: Sequence[Projection],
    thresholds: Mapping[str, float],
    scheme: Scheme,
    watch: Watch,
    batches: Iterable[tuple[NDArray[Any], Sequence[str]]],
) -> dict[str, NDArray[np.float32]]:
    """Measure each projection's mean error of its output [.., c], by its node's name.

    ``model`` is fp32 and smoothed; ``watch`` watches the inputs of ``projections``. Convolutions
    are left out.
    """
    linear = [p for p in projections if p.role is not Role.PATCH]
    steps = {p.x: scales(thresholds[p.x], scheme.form, scheme.base) for p in linear}
    exact, rounded = _means(steps, scheme, watch, batches)
    found = {}
    for projection in linear:
        weight = array_of(model.graph.initializers[projection.weight])
        columns = np.moveaxis(weight, projection.axis, -1)  # [in, out]
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
    value, builder = operand(node, index), GraphBuilder(model.graph)
    corrected = builder.constant(array_of(value) - error, f"{value.name}.corrected")
    node.replace_input_with(index, corrected)


BLOCK_ROLES = frozenset({Role.QKV, Role.OUT, Role.FC1, Role.FC2})


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice of what to quantise in ``model``, an fp32 graph that is never changed.

    ``thresholds`` are the largest values represented, by tensor; ``corrections`` are subtracted
    from biases, by node. Empty until they were measured.
    """

    model: ir.Model
    scheme: Scheme
    projections: tuple[Projection, ...]
    operands: tuple[Operands, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    corrections: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: ir.Model, scheme: Scheme, *, attention: bool, extra: Collection[Role] = ()
    ) -> "Plan":
        """Find what to quantise; ``model`` is changed to the form of attention it takes.

        ``attention`` adds attention's own products, ``extra`` roles outside the blocks.
        """
        fuse_attention(model, AttentionForm.PLAIN if attention else AttentionForm.HEADS)
        chosen = BLOCK_ROLES | set(extra)
        projections = tuple(p for p in find_projections(model) if p.role in chosen)
        operands = find_operands(model) if attention else ()
        if operands:
            require_fusable(_tokens(model, operands[0]), scheme)
        return cls(model, scheme, projections, operands)

    @property
    def depth(self) -> int:
        return len(find_cores(self.model))

    @property
    def watched(self) -> dict[str, str]:
        """Tensors whose range must be known, each with the option that asks for it."""
        names = {p.x: "" for p in self.projections if p.role in BLOCK_ROLES}
        names |= {p.x: f"--quantize-{p.role}" for p in self.projections if p.x not in names}
        for core in self.operands:
            wanted = (core.q, core.k, core.p, core.v) if self._probabilities_measured else (
                core.q, core.k, core.v
            )  # fmt: skip
            names |= dict.fromkeys(wanted, "--quantize-attention")
        return names

    @property
    def _probabilities_measured(self) -> bool:
        """True where softmax's range is measured.

        int8 has 127 even steps and the probabilities of 197 tokens are 0.005 on average: they need
        all steps there are. fp8's steps are relative: 1 is the range, whatever the images.
        """
        return self.scheme.form.dtype is Dtype.INT8

    def measured(self, histograms: Mapping[str, Histogram], observer: Observer) -> "Plan":
        form = self.scheme.form
        found = {name: threshold(seen, observer, form) for name, seen in histograms.items()}
        found |= {core.p: 1.0 for core in self.operands if not self._probabilities_measured}
        return replace(self, thresholds=found)

    def quantised(self, kept: Collection[int] = ()) -> ir.Model:
        """Write the fp32 graph with Q/DQ everywhere but in the blocks ``kept``."""
        model = self.model.clone()
        chosen = [p for p in self.projections if p.block not in kept]
        wrong = {p.node: self.corrections[p.node] for p in chosen if p.node in self.corrections}
        correct(model, wrong)
        quantise_projections(model, chosen, self.thresholds, self.scheme)
        cores = [core for core in self.operands if core.block not in kept]
        quantise_attention(model, cores, self.thresholds, self.scheme)
        self._fuse(model)
        return model

    def unquantised(self) -> ir.Model:
        model = self.model.clone()
        self._fuse(model)
        return model

    def _fuse(self, model: ir.Model) -> None:
        try:
            fuse_attention(model, self.scheme.attention, expected=self.depth)
        except FusionError as error:
            if self.scheme.target is not Target.ONNXRUNTIME:
                raise
            raise GraphError(
                f"{self.scheme.form.dtype} beside fp32 is for onnxruntime, and the last block of "
                "this graph is written for TensorRT; export it with --target onnxruntime, or "
                "choose another --base"
            ) from error
        if model.graph.opset_imports[""] > self.scheme.target.opset:
            lower_opset(model, self.scheme.target.opset)


def _tokens(model: ir.Model, core: Operands) -> int:
    values = {value.name: value for node in model.graph for value in node.outputs}
    sizes = sizes_of(values[core.v])
    return (sizes[-2] or 0) if len(sizes) == 4 else 0
