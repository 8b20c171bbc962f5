"""The project speaks the words of its field: no private word, no docstring that is a riddle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import msn_export

PACKAGE = Path(msn_export.__file__).parent
ROOT = Path(__file__).parent.parent.parent
# words that stood for what the field has a word for; each with that word
PRIVATE = {
    "stem": "input_format", "InputKind": "InputFormat", "room": "max_batch",
    "room_of": "max_batch", "affordable_batch": "max_batch_in_memory",
    "known": "manifest, preprocessing, names", "made": "preprocessing", "told": "reply, notes",
    "judge": "evaluate, decide", "servable": "Artifact",
    "type_as": "convert", "Narrowed": "cls_only",
    "set_heads_apart": "attention_3d_to_4d",
    "expose": "mark_outputs", "SEEN": "mark_outputs", "PLACES": "TENSORS",
    "GraphFacts": "GraphSummary", "Draft": "GraphBuilder", "Patch": "GraphBuilder",
    "Lane": "ExecutionSlot", "lane": "slot", "lanes": "slots",
    "Arena": "OutputMemory", "arena": "output memory", "Owned": "Handle", "deal": "split_batch",
    "piece": "chunk", "pieces": "chunks", "admission": "verify_engine_file",
    "Admitted": "VerifiedEngine", "admitted": "verified", "admit_engine": "verify_engine_file",
    "Heard": "BuilderLog", "heard": "callbacks, log", "twin": "baseline", "Judged": "Evaluation",
    "Probe": "SensitivitySample", "ranged": "collected", "take_ranges": "collect_ranges",
    "Seam": "SmoothingSite", "seams": "sites", "Savings": "CostBenefit", "savings": "benefit",
    "weigh": "memory", "Cargo": "ArtifactBytes", "cargo": "artifact bytes",
    "Crew": "WorkerLayout", "crew": "layout", "growing": "Journal", "one_model": "same_model",
    "Subject": "ModelUnderLint", "suspects": "diagnose", "said": "notes",
}  # fmt: skip
# names of formats that are not ours to change: a key of the manifest, a field of DLPack
EXCEPTED = {"manifest.py": "twin", "commands/calibrate.py": "twin", "runtime/dlpack.py": "lanes"}
# of these the prose has no other meaning
IN_PROSE = re.compile(
    r"\b(twins?|lanes?|arenas?|cargo|crews?|servable|affordable batch|admitted|one_model)\b", re.I
)
RIDDLE = re.compile(r"(What|Whether|How|Where|Tell|Say)\b")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and node.attr != "stem":  # a pathlib.Path's
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_identifier_is_a_private_word(path) -> None:
    found = {
        f"line {line}: {name}, say {PRIVATE[name.strip('_')]}"
        for name, line in identifiers(ast.parse(path.read_text()))
        if name.strip("_") in PRIVATE and name != EXCEPTED.get(str(path.relative_to(PACKAGE)))
    }
    assert found == set()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_docstring_begins_with_a_noun_or_an_imperative(path) -> None:
    riddles = [
        docstring.partition("\n")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (docstring := ast.get_docstring(node))
        and RIDDLE.match(docstring)
    ]
    assert riddles == []


@pytest.mark.parametrize("path", [*sources(), *pages()], ids=lambda p: p.name)
def test_no_text_has_a_private_word(path) -> None:
    excepted = EXCEPTED.get(str(path.relative_to(PACKAGE))) if path.suffix == ".py" else None
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    hits = [(number, m[0]) for number, line in lines for m in IN_PROSE.finditer(line)]
    assert [f"line {number}: {word}" for number, word in hits if word != excepted] == []
