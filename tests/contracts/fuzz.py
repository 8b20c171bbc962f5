"""Mutations of the files that commands read, and what may come of a command that reads one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from hypothesis import strategies as st

from msn_export import manifest
from msn_export.files import STAGING_PREFIX
from tests.builders.fork_server import ForkServer, Outcome, count

SECONDS = 60.0  # of a case: more is a hang
MEMORY = 8 * 2**30  # address space; of it 3 are the libraries'

NUMBERS = st.sampled_from([-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**6])
TEXTS = st.sampled_from(["", "x", "\u202e", "../../etc/passwd", "a" * 300, "Loop", "1e999"])
VALUES = st.one_of(
    NUMBERS, TEXTS, st.none(), st.booleans(),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e300, [], {}, [[]], [0] * 50]),
)  # fmt: skip


class Target(NamedTuple):
    """A kind of file: its name, and commands that read it."""

    file: str
    commands: tuple[tuple[str, ...], ...]
    mutate: Callable[[st.DataObject, bytes], bytes]


def bytes_of(data: st.DataObject, content: bytes) -> bytes:
    """Change a few bytes, or cut the file."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, min(len(changed), 20_000) - 1)))
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(changed))))
    return bytes(changed if cut is None else changed[:cut])


def graph_of(data: st.DataObject, content: bytes) -> bytes:
    """Change a graph that stays a message: operators, attributes, names, shapes, weights."""
    if data.draw(st.integers(0, 3)) == 0:
        return bytes_of(data, content)
    model = onnx.ModelProto.FromString(content)
    del model.metadata_props[:]
    for _ in range(data.draw(st.integers(1, 3))):
        data.draw(st.sampled_from(_EDITS))(data, model.graph)
    return model.SerializeToString()


def _one(data: st.DataObject, items: Any) -> Any:
    return items[data.draw(st.integers(0, len(items) - 1))] if len(items) else None


def _operator(data: st.DataObject, graph: onnx.GraphProto) -> None:
    node = _one(data, graph.node)
    if node is not None:
        names = ["Loop", "If", "Scan", "MatMul", "Reshape", "Identity", "Nothing", "Gather", "Tile"]
        node.op_type = data.draw(st.sampled_from(names))


def _attribute(data: st.DataObject, graph: onnx.GraphProto) -> None:
    """Give an attribute another value and type, or add one."""
    node = _one(data, graph.node)
    if node is None:
        return
    held = _one(data, node.attribute)
    if held is None:
        held = node.attribute.add(
            name=data.draw(st.sampled_from(["axis", "to", "perm", "epsilon"]))
        )
    name = held.name
    held.Clear()
    held.name = name
    held.type = data.draw(st.integers(0, 14))
    held.i = data.draw(NUMBERS)
    held.s = data.draw(TEXTS).encode()
    held.ints.extend(data.draw(st.lists(NUMBERS, max_size=3)))


def _name(data: st.DataObject, graph: onnx.GraphProto) -> None:
    node = _one(data, graph.node)
    if node is None:
        return
    names = node.input if data.draw(st.booleans()) and len(node.input) else node.output
    if len(names):
        other = _one(data, graph.node)
        at = data.draw(st.integers(0, len(names) - 1))
        names[at] = data.draw(st.one_of(TEXTS, st.just(other.output[0] if other.output else "")))


def _shape(data: st.DataObject, graph: onnx.GraphProto) -> None:
    value = _one(data, [*graph.input, *graph.output, *graph.value_info])
    dims = value.type.tensor_type.shape.dim
    if len(dims):
        _one(data, dims).dim_value = data.draw(NUMBERS)
    value.type.tensor_type.elem_type = data.draw(st.sampled_from([1, 1, 2, 7, 10, 16, 99]))


def _weight(data: st.DataObject, graph: onnx.GraphProto) -> None:
    weight = _one(data, graph.initializer)
    if weight is None:
        return
    edit = data.draw(st.integers(0, 2))
    if edit == 0 and len(weight.dims):
        weight.dims[0] = data.draw(NUMBERS)
    elif edit == 1:
        weight.data_type = data.draw(st.integers(0, 24))
    else:
        weight.raw_data = weight.raw_data[: data.draw(st.integers(0, 8))]


def _remove(data: st.DataObject, graph: onnx.GraphProto) -> None:
    held = data.draw(st.sampled_from(["node", "input", "output", "initializer"]))
    items = getattr(graph, held)
    if len(items):
        del items[data.draw(st.integers(0, len(items) - 1)) :]


_EDITS = (_operator, _attribute, _attribute, _name, _shape, _weight, _remove)


def json_of(data: st.DataObject, content: bytes) -> bytes:
    """Change values of a JSON file, wherever they are."""
    if data.draw(st.integers(0, 5)) == 0:
        return bytes_of(data, content)
    return json.dumps(changed(data, json.loads(content))).encode()


def manifest_of(data: st.DataObject, content: bytes) -> bytes:
    """Change values of a manifest under a seal that fits them."""
    plain = json.loads(content)
    plain.pop("seal")
    plain = changed(data, plain)
    if not isinstance(plain, dict):
        return json.dumps(plain).encode()
    return json.dumps({**plain, "seal": manifest._hash_of(plain)}).encode()


def changed(data: st.DataObject, plain: Any) -> Any:
    """Replace, remove or add up to three values of nested lists and objects."""
    for _ in range(data.draw(st.integers(1, 3))):
        holder = plain
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = keys[data.draw(st.integers(0, len(keys) - 1))]
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 3)):
                holder = inner
                continue
            if isinstance(holder, dict) and not data.draw(st.integers(0, 4)):
                del holder[key]
            else:
                holder[key] = data.draw(VALUES)
            break
    return plain


PICTURES = "pictures"
TARGETS: dict[str, Target] = {
    "graph": Target(
        "g.onnx",
        (
            ("inspect", "g.onnx"),
            ("embed", "g.onnx", PICTURES, "-o", "e.npy", "--force"),
            ("validate", "m.onnx", "g.onnx", "--images", PICTURES),
            ("trt", "g.onnx", "--fp16", "--backend", "tensorrt-rtx", "--compute-capability", "8.9",
             "-o", "g.engine", "--force"),
        ),
        graph_of,
    ),
    "manifest": Target(
        "m.onnx.json",
        (
            ("inspect", "m.onnx"),
            ("embed", "m.onnx", PICTURES, "-o", "e.npy", "--force"),
            ("report", "m.onnx", "-o", "r.html", "--markdown", "r.md", "--force"),
            ("triton", "m.onnx", "-o", "repository", "--force"),
        ),
        manifest_of,
    ),
    "ranges": Target(
        "q.ranges.json",
        (("calibrate", "m.onnx", "--int8", "--images", PICTURES, "--no-compile", "--ranges",
          "q.ranges.json", "-o", "p.onnx", "--force"),),
        json_of,
    ),
    "configuration": Target(
        "tiny/config.json",
        (("onnx", "tiny", "-o", "o.onnx", "--no-check", "--force"),),
        json_of,
    ),
    "preprocessing": Target(
        "p.json",
        (("embed", "m.onnx", PICTURES, "--preprocess", "p.json", "-o", "e.npy", "--force"),),
        json_of,
    ),
}  # fmt: skip


def try_one(server: ForkServer, place: Path, name: str, data: st.DataObject) -> None:
    """Run a command on a mutated file; it must end with its exit code and one line, and tidily."""
    target = TARGETS[name]
    path = place / target.file
    whole = path.read_bytes()
    command = data.draw(st.sampled_from(target.commands))
    try:
        path.write_bytes(target.mutate(data, whole))
        before = {p.name for p in place.iterdir()}
        outcome = server.run(*command, cwd=place, timeout=SECONDS, memory=MEMORY)
        left = [p for p in place.iterdir() if p.name.startswith(STAGING_PREFIX)]
        count(name, outcome, len(left))
        for one in left:  # or the next case would be blamed
            shutil.rmtree(one)
        require_tidy(outcome, place, before, f"{name}: {' '.join(command)}")
        assert not left, f"{name}: {' '.join(command)} left {left}: {outcome}"
    finally:
        path.write_bytes(whole)


def require_tidy(outcome: Outcome, place: Path, before: set[str], what: str) -> None:
    assert outcome.code is not None, f"{what} hung"
    assert outcome.code in {0, 1, 2}, f"{what} crashed: {outcome}"
    assert "error: unexpected" not in outcome.stderr, f"{what}: {outcome}"
    assert "Traceback" not in outcome.stderr, f"{what}: {outcome}"
    if outcome.code == 1:
        assert outcome.last.startswith("error: ") or outcome.stdout, f"{what}: {outcome}"
        new = {p.name for p in place.iterdir()} - before
        is_error = outcome.last.startswith("error: ")
        assert not is_error or all(name.endswith(".parts") for name in new), f"{what} left {new}"
