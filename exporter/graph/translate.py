"""Walk a symbolic trace of a module and write each call as ONNX nodes."""

import re
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from torch import fx, nn

from msn_export.errors import GraphError
from msn_export.graph.draft import Draft
from msn_export.graph.operators import CALLS, MODULES

# Wrappers around the model whose names say nothing of it
_WRAPPERS = re.compile(r"^model(\.|$)")


def translate(traced: fx.Graph, root: nn.Module, images: ir.Value) -> tuple[Draft, list[ir.Value]]:
    """Write a trace of ``root``, whose one input is ``images``.

    Returns:
        The graph's nodes and weights, and its outputs.

    Raises:
        GraphError: the module calls something that has no ONNX form here.
    """
    draft = Draft()
    known: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        draft.scope = _scope(node) or draft.scope  # what no module does follows its neighbour
        match node.op:
            case "placeholder":
                known[node] = images
            case "get_attr":
                parameter = root.get_parameter(node.target)
                known[node] = draft.weight(_WRAPPERS.sub("", node.target), parameter)
            case "output":
                return draft, list(args[0])
            case _:
                known[node] = _call(draft, root, node, args, kwargs)
    raise GraphError("the trace has no output")


def _call(
    draft: Draft, root: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    name = str(node.target) if isinstance(node.target, str) else node.target.__name__
    write: Callable[..., Any] | None
    if node.op == "call_module":
        module = root.get_submodule(name)
        write, args = MODULES.get(type(module)), (*args, module, _WRAPPERS.sub("", name))
        name = type(module).__name__
    elif callable(node.target) and not _has_values(args):
        return node.target(*args, **kwargs)  # arithmetic on sizes
    else:
        write = CALLS.get(name)
    if write is None:
        raise GraphError(f"the model calls {name}, which has no ONNX form here")
    try:
        return write(draft, *args, **kwargs)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise GraphError(f"the model's {name} has no ONNX form here: {reason}") from error


def _has_values(args: Any) -> bool:
    if isinstance(args, tuple | list):
        return any(map(_has_values, args))
    return isinstance(args, ir.Value)


def _scope(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return _WRAPPERS.sub("", stack[-1][0]) if stack else ""
