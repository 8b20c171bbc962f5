"""What a graph says of itself: the constants that numbers alone may not tell apart.

A LayerNorm's epsilon is lost in fp32 rounding as soon as the stream's variance is some ten thousand
times larger (docs/tolerances.md), and either form of GELU passes the gate of a half precision
graph. Both stand in the graph, so they are read there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.inside import parts_of
from msn_export.graph.stream import Block, find_stream

Structure = Mapping[str, float | str]

_EPS = 1e-5  # onnx.ai operators, LayerNormalization, attribute epsilon
# transformers' activation names by the function they are; others are not told apart here
_GELU = {
    "gelu": ("gelu", "gelu_python"),
    "gelu, tanh form": (
        "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh",
    ),
}  # fmt: skip


def structure_of(model: ir.Model) -> Structure:
    """Read a graph's epsilons and activations; what is not understood is left out."""
    try:
        stream = find_stream(model)
    except GraphError:
        return {}
    found: dict[str, float | str] = {}
    inside: set[ir.Node] = set()
    for block in stream.blocks:
        inside.update(block.nodes)
        for name, value in parts_of(block).items():
            node = value.producer()
            if node is not None and node.op_type == "LayerNormalization":
                found[f"{name}: epsilon"] = _epsilon(node)
        activation = _activation(block)
        if activation:
            found[f"block {block.number}: activation"] = activation
    final = [n for n in model.graph if n.op_type == "LayerNormalization" and n not in inside]
    if len(final) == 1:
        found["final norm: epsilon"] = _epsilon(final[0])
    return found


def structure_of_module(model: Any) -> Structure:
    """Read the same of the PyTorch reference (``VitMsn``)."""
    # the last LayerNorm is the classifier's own where there is no final one
    last: Any = model.norm or model.fc_norm or model.classifier.norm
    found: dict[str, float | str] = {"final norm: epsilon": last.eps}
    activation = next(
        (kind for kind, names in _GELU.items() if model.config.activation in names), ""
    )
    for number, block in enumerate(model.blocks):
        found[f"block {number} norm before attention: epsilon"] = block.norm1.eps
        found[f"block {number} norm before MLP: epsilon"] = block.norm2.eps
        if activation:
            found[f"block {number}: activation"] = activation
    return found


def differences(reference: Structure, candidate: Structure) -> list[str]:
    """Say where two structures contradict each other; what only one tells is no contradiction."""
    found: dict[str, list[str]] = {}
    for name in reference.keys() & candidate.keys():
        want, have = reference[name], candidate[name]
        if isinstance(want, float) and isinstance(have, float):
            same = abs(want - have) <= 1e-3 * want  # both went through a float32
        else:
            same = want == have
        if not same:
            where, _, what = name.partition(": ")
            shown = (f"{x:g}" if isinstance(x, float) else x for x in (have, want))
            found.setdefault("{} is {}, the reference's {}".format(what, *shown), []).append(where)
    return [f"{what} in {_some(sorted(where, key=_order))}" for what, where in found.items()]


def _order(where: str) -> tuple[int, str]:
    words = where.split()
    return (int(words[1]), where) if words[0] == "block" else (1 << 30, where)


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _epsilon(node: ir.Node) -> float:
    attribute = node.attributes.get("epsilon")
    return _EPS if attribute is None else attribute.as_float()


def _activation(block: Block) -> str | None:
    """Tell the two forms of GELU, as an operator or written out."""
    start = block.streams[0].producer()
    nodes = block.nodes[block.nodes.index(start) :] if start in block.nodes else ()
    types = {node.op_type for node in nodes}
    for node in nodes:
        if node.op_type == "Gelu":
            form = node.attributes.get("approximate")
            tanh = form is not None and form.as_string() == "tanh"
            return "gelu, tanh form" if tanh else "gelu"
    if "Erf" in types:
        return "gelu"
    return "gelu, tanh form" if "Tanh" in types else None
