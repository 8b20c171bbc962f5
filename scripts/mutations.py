"""Small faults in Python source: where one can be planted, and the source with it.

Each is a change that a person could have made: a comparison swapped, a constant or default changed,
an argument dropped, a ``not`` or a minus sign removed, an operator exchanged, a condition negated,
a statement deleted. Nothing is changed that no test could see: annotations, decorators, assertions,
docstrings; nor inside f-strings, whose positions Python tells from 3.12 on.
"""

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
}  # fmt: skip
_TEXTS = (ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.ListComp)


@dataclass(frozen=True, slots=True)
class Mutation:
    """Bytes ``start`` to ``end`` of a source, to be replaced by ``new``."""

    kind: str
    line: int
    start: int
    end: int
    new: str

    def apply(self, source: bytes) -> bytes:
        """Give the source with the fault."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def compiles(self, source: bytes) -> bool:
        """Whether Python can read the source with the fault: rarely not, and slow to find out."""
        try:
            ast.parse(self.apply(source))
        except SyntaxError:
            return False
        return True


def mutations_of(source: bytes) -> list[Mutation]:
    """Find every place for a fault, in the order of the source; not each compiles."""
    found = {(one.start, one.end, one.new): one for one in _Finder(source).walk()}
    return sorted(found.values(), key=lambda one: (one.start, one.end, one.new))


class _Finder:
    def __init__(self, source: bytes) -> None:
        self._source = source
        self._tree = ast.parse(source)
        lines = source.splitlines(keepends=True)
        self._offsets = [0]
        for line in lines:
            self._offsets.append(self._offsets[-1] + len(line))

    def walk(self) -> Iterator[Mutation]:
        yield from self._of(self._tree)

    def _of(self, node: ast.AST) -> Iterator[Mutation]:
        if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        yield from self._at(node)
        for name, value in ast.iter_fields(node):
            if name in {"annotation", "returns", "decorator_list", "bases"}:
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._of(child)

    def _at(self, node: Any) -> Iterator[Mutation]:
        match node:
            case ast.Compare() | ast.BinOp() | ast.BoolOp():
                yield from self._exchanged(node)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                kind = "not removed" if isinstance(node.op, ast.Not) else "sign removed"
                yield self._replaced(kind, node, self._text(node.operand))
            case ast.Constant():
                new = _changed(node.value)
                if new is not None:
                    yield self._replaced("constant", node, new)
            case ast.Call():
                yield from self._arguments(node)
            case ast.If() | ast.IfExp() | ast.While():
                if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                    text = self._text(node.test)
                    yield self._replaced("condition negated", node.test, f"(not ({text}))")
            case ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign():
                yield self._replaced("statement deleted", node, "pass")
            case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
                yield self._replaced("statement deleted", node, "pass")

    def _exchanged(self, node: ast.Compare | ast.BinOp | ast.BoolOp) -> Iterator[Mutation]:
        """Exchange an operator."""
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, op, right in zip(operands, node.ops, node.comparators, strict=False):
                yield from self._between("comparison", left, right, *_COMPARISONS[type(op)])
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in itertools.pairwise(node.values):
                yield from self._between("operator", left, right, old, new)
        elif type(node.op) in _OPERATORS and not (_is_text(node.left) or _is_text(node.right)):
            yield from self._between("operator", node.left, node.right, *_OPERATORS[type(node.op)])

    def _arguments(self, call: ast.Call) -> Iterator[Mutation]:
        """Drop a keyword argument, or the last of several without keyword."""
        places: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        droppable = [*call.args[1:][-1:], *(k for k in call.keywords if k.arg is not None)]
        for one in droppable:
            at = places.index(one)
            if at:
                start = self._end(places[at - 1])
                yield Mutation("argument dropped", self._line(one), start, self._end(one), "")
            elif len(places) > 1:
                end = self._start(places[1])
                yield Mutation("argument dropped", self._line(one), self._start(one), end, "")
            else:
                yield self._replaced("argument dropped", one, "")

    def _between(
        self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str
    ) -> Iterator[Mutation]:
        """Exchange the operator between two operands; brackets may stand there too."""
        start, end = self._end(left), self._start(right)
        text = self._source[start:end].decode()
        at = text.find(old)
        if at >= 0 and "#" not in text:
            first = start + len(text[:at].encode())
            yield Mutation(kind, self._line(left), first, first + len(old), new)

    def _replaced(self, kind: str, node: ast.expr | ast.stmt | ast.keyword, new: str) -> Mutation:
        return Mutation(kind, node.lineno, self._start(node), self._end(node), new)

    def _text(self, node: ast.expr) -> str:
        return self._source[self._start(node) : self._end(node)].decode()

    def _start(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._offsets[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._offsets[node.end_lineno - 1] + node.end_col_offset

    def _line(self, node: ast.expr | ast.keyword) -> int:
        return node.lineno


def _is_text(node: ast.expr) -> bool:
    """Whether an operand is no number for sure: its other operators raise TypeError at once."""
    return isinstance(node, _TEXTS) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _changed(value: object) -> str | None:
    match value:
        case bool():
            return str(not value)
        case int():
            return str(value + 1)
        case float():
            return repr(value * 2 if value else 1.0)
    return None
