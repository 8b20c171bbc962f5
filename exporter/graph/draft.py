"""An ONNX graph in the making: every value with its shape, every node named after its module."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

# A size is a number, or the batch's name.
Dim = int | ir.SymbolicDim
Shape = tuple[Dim, ...]


def shape_of(value: ir.Value) -> Shape:
    """Give a value's shape, which is known of every value here."""
    assert value.shape is not None
    return tuple(value.shape)


class Draft:
    """Nodes and weights so far; ``scope`` is the module that what is added is named after.

    The names matter: the compiler's log repeats them, and by them a kernel is traced to its block.
    """

    def __init__(self) -> None:
        self.scope = ""
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._seen: Counter[str] = Counter()

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Shape,
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Add a node of one output, of its first input's type unless ``dtype`` is another."""
        return self.ops(op_type, inputs, [shape], attributes, dtype)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shapes: Sequence[Shape],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node with an output of each shape."""
        node = ir.node(op_type, inputs, attributes, num_outputs=len(shapes))
        stem = f"{self.scope}.{op_type}" if self.scope else op_type
        self._seen[stem] += 1
        node.name = stem if self._seen[stem] == 1 else f"{stem}_{self._seen[stem]}"
        kind = dtype or inputs[0].dtype
        assert kind is not None  # every value here has its type
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = node.name if len(shapes) == 1 else f"{node.name}.{index}"
            value.shape, value.type = ir.Shape(shape), ir.TensorType(kind)
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Add a small constant; ``name`` says what it holds, so one name is one constant."""
        if name not in self.initializers:
            self._hold(ir.tensor(array), name)
        return self.initializers[name]

    def weight(self, name: str, tensor: Tensor) -> ir.Value:
        """Add a parameter; it shares the model's memory."""
        if name not in self.initializers:
            self._hold(ir.tensor(tensor.detach().numpy()), name)
        return self.initializers[name]

    def transposed(self, name: str, tensor: Tensor) -> ir.Value:
        """Add a matrix [out, in] as [in, out]; transposed anew when read, so that no copy stays."""
        if name not in self.initializers:
            rows, columns = tensor.shape
            make = partial(_transposed, tensor.detach())
            dtype = ir.tensor(tensor.detach().numpy()).dtype
            self._hold(ir.LazyTensor(make, dtype, ir.Shape((columns, rows))), name)
        return self.initializers[name]

    def _hold(self, tensor: ir.TensorProtocol, name: str) -> None:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self.initializers[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)

    def reshape(self, x: ir.Value, shape: Shape) -> ir.Value:
        """Add a Reshape that keeps the batch."""
        sizes = [-1, *(require_size(dim) for dim in shape[1:])]
        name = "x".join(str(size) for size in sizes[1:])
        target = self.constant(np.array(sizes), f"shape.bx{name}")
        return self.op("Reshape", [x, target], shape)


def require_size(dim: Dim) -> int:
    """Require a size that is known.

    Raises:
        ValueError: it is the batch, which no operator may be told.
    """
    if not isinstance(dim, int):
        raise ValueError(f"the batch {dim} would become a constant")  # noqa: TRY004
    return dim


def _transposed(matrix: Tensor) -> ir.TensorProtocol:
    return ir.tensor(matrix.t().contiguous().numpy())
