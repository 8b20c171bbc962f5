"""What a manifest says of a graph: its tensors, its operators, its size."""

from collections import Counter
from dataclasses import dataclass
from typing import Self

import onnx_ir as ir

from msn_export.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What a manifest says of a graph, without its weights; ``ops`` the most frequent first."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    ops: dict[str, int]
    opset: int

    @classmethod
    def of(cls, model: ir.Model) -> Self:
        """Read them off a graph."""
        return cls(
            inputs=tensor_specs(list(model.graph.inputs)),
            outputs=tensor_specs(list(model.graph.outputs)),
            nodes=len(model.graph),
            ops=operators(model),
            opset=model.graph.opset_imports[""],
        )


def operators(model: ir.Model) -> dict[str, int]:
    """Count the graph's nodes by operator, the most frequent first."""
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph
    )
    return dict(counts.most_common())


def tensor_specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Describe graph inputs or outputs: names, dtypes as ONNX spells them, shapes."""
    return tuple(
        TensorSpec(
            name=value.name or "",
            dtype=value.dtype.name.lower() if value.dtype else "undefined",
            shape=tuple(
                size if isinstance(size, int) else str(size.value) for size in (value.shape or ())
            ),
        )
        for value in values
    )
