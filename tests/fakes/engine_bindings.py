"""Collects the TensorRT and CUDA names that source code uses, and looks them up in real modules.

The convention it relies on is in msn_export.engine.compile and msn_export.runtime.versions: the
module is called ``trt`` or annotated ``TensorRT``, that of CUDA's driver API ``CudaDriver``, and
whatever TensorRT gives is bound to a variable, or attribute of ``self``, annotated with its class.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

MODULE = "TensorRT"
CUDA = "CudaDriver"  # names of this module are collected as ``CudaDriver.name``
PLAIN = frozenset({"name", "value"})  # of any enum member

LOOK_UP = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
trt = importlib.import_module(sys.argv[2])
missing = []
for name in json.load(sys.stdin):
    found = trt
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        missing.append(name)
print(json.dumps({"version": getattr(trt, "__version__", ""), "missing": missing}))
"""


@dataclass
class Names:
    """``used`` must exist, ``optional`` (getattr with a default) may, ``unclear`` is not told."""

    used: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    unclear: list[str] = field(default_factory=list)

    def __or__(self, other: "Names") -> "Names":
        return Names(
            self.used | other.used, self.optional | other.optional, self.unclear + other.unclear
        )


def collect(source: str, classes: frozenset[str]) -> Names:
    """Collect the TensorRT names in ``source``; ``classes`` are those it annotates with."""
    tree = ast.parse(source)
    collector = _Collector(classes)
    collector.visit_scope(tree.body, {"trt": MODULE})
    return collector.names


def declared_classes(source: str) -> frozenset[str]:
    """List the names that a module declares as ``X: TypeAlias = Any``."""
    return frozenset(
        node.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and ast.unparse(node.annotation) == "TypeAlias"
        and node.value is not None
        and ast.unparse(node.value) == "Any"
    )


class _Collector(ast.NodeVisitor):
    """Walks one scope after another; ``self.types`` maps a variable to its class."""

    def __init__(self, classes: frozenset[str]) -> None:
        self.classes = classes
        self.names = Names()
        self.types: dict[str, str | None] = {}
        self.attributes: dict[str, str] = {}  # of the class that is read

    def visit_scope(self, body: list[ast.stmt], types: dict[str, str | None]) -> None:
        outer, self.types = self.types, dict(types)
        for statement in body:
            self.visit(statement)
        self.types = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        types = dict(self.types)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            types[argument.arg] = self.class_of(argument.annotation) or types.get(argument.arg)
        self.visit_scope(node.body, types)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            self.visit(base)
            if isinstance(base, ast.Attribute) and self.root(base) == MODULE:
                self.names.used |= {
                    f"{base.attr}.{method.name}"
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                }
        outer, self.attributes = self.attributes, self._annotated(node)
        self.visit_scope(node.body, self.types)
        self.attributes = outer

    def _annotated(self, node: ast.ClassDef) -> dict[str, str]:
        """Find the attributes that a class annotates: ``self.cuda: CudaDriver = cuda``."""
        found = {}
        for part in ast.walk(node):
            if isinstance(part, ast.AnnAssign) and (kind := self.class_of(part.annotation)):
                target = ast.unparse(part.target)
                if target.startswith("self.") or part in node.body:
                    found[target.removeprefix("self.")] = kind
        return found

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        if isinstance(node.target, ast.Name):
            self.types[node.target.id] = self.class_of(node.annotation)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        value = node.value.func if isinstance(node.value, ast.Call) else node.value
        untold = isinstance(value, ast.Attribute) and self.root(value) is not None
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.types[target.id] = "?" if untold else None
            else:
                self.visit(target)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            owner, name = node.args[0], node.args[1]
            kind = self.root(owner)
            if kind is not None and isinstance(name, ast.Constant):
                owners = (
                    [kind] if isinstance(owner, ast.Name) else ast.unparse(owner).split(".")[1:]
                )
                self.names.optional.add(
                    ".".join([*owners, str(name.value)]).removeprefix(f"{MODULE}.")
                )
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self.root(node)
        if kind is None:
            if isinstance(node.value, ast.Call) and self.root(node.value.func) is not None:
                self.unclear(node)
            self.generic_visit(node)
            return
        parts = self.members(node)
        parts = parts[: next((i for i, part in enumerate(parts) if part[:2] == "__"), len(parts))]
        if (
            kind == "?"
            or len(parts) > 2
            or (kind not in {MODULE, CUDA} and parts[1:] and parts[1] not in PLAIN)
        ):
            self.unclear(node)
        elif kind == CUDA:
            self.names.used |= {".".join([CUDA, *parts[: i + 1]]) for i in range(len(parts))}
        elif kind == MODULE:
            self.names.used |= {".".join(parts[: i + 1]) for i in range(len(parts))}
        elif parts:
            self.names.used.add(f"{kind}.{parts[0]}")

    def unclear(self, node: ast.AST) -> None:
        self.names.unclear.append(f"line {node.lineno}: {ast.unparse(node)}")

    def members(self, node: ast.Attribute) -> list[str]:
        """What a chain of attributes names behind the object it starts from."""
        parts = ast.unparse(node).split(".")
        return parts[2:] if parts[0] == "self" and parts[1] in self.attributes else parts[1:]

    def root(self, node: ast.AST) -> str | None:
        """The class of the variable, or attribute of self, that a chain starts from."""
        last = node
        while isinstance(node, ast.Attribute):
            last, node = node, node.value
        if not isinstance(node, ast.Name):
            return None
        if node.id == "self" and isinstance(last, ast.Attribute) and last.attr in self.attributes:
            return self.attributes[last.attr]
        return self.types.get(node.id)

    def class_of(self, annotation: ast.expr | None) -> str | None:
        text = ast.unparse(annotation).strip("'\"") if annotation is not None else ""
        return text if text in self.classes else None


def look_up(names: set[str], folder: Path, module: str, libraries: Path | None = None) -> dict:
    """Import ``module`` from ``folder`` in its own process; tell its version and what it lacks."""
    environment = dict(os.environ)
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    run = subprocess.run(
        [sys.executable, "-P", "-c", LOOK_UP, str(folder), module],
        input=json.dumps(sorted(names)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
