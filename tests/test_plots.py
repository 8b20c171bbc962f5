"""A plot is drawn of whatever was measured, in the page's colours, and is named for the blind."""

import math
import re
from typing import Any

import matplotlib as mpl
import pytest
from manifests import check

from msn_export.manifest import ImageRecord
from msn_export.report import facts, render


def stage(name: str, **changes: Any) -> facts.Stage:
    figures = {
        "cosine": 1.0, "relative": 1e-3, "max_abs": 1e-3, "largest": 4.0, "allowed": 5e-3,
        "own": 1e-3, "headroom": 1e4,
    }  # fmt: skip
    return facts.Stage(name, **{**figures, **changes})


def drift(*stages: facts.Stage, parted: str | None = None) -> facts.DriftRow:
    return facts.DriftRow("b.onnx", "a.onnx", "…", parted, stages, parted, (), 4.0)


def agreement(*cosines: float | None) -> facts.AgreementRow:
    images = tuple(ImageRecord(f"{i}.png", c, 0.0) for i, c in enumerate(cosines))
    return facts.AgreementRow("b.onnx", "a.onnx", True, True, check(per_image=images), "fp16")


def artifact(**changes: Any) -> facts.ArtifactRow:
    fields: dict[str, Any] = {
        "name": "m & <n>.onnx", "kind": "ONNX graph", "precision": "fp16", "bytes": 43_000_000,
        "weight_bytes": 1, "sha256": "ab", "runs_on": "", "fused": "", "verdict": "passed",
        "rows": (),
    }  # fmt: skip
    return facts.ArtifactRow(**{**fields, **changes})


ENGINE = facts.EngineRow(
    kernels=3, fused=1, blocks=1, products={"fp16": 1}, kinds={"attention": 1, "matrix product": 2},
    per_block={"0": 3}, layout_only=0, closed=0, weight_bytes={}, strips=(), built_for="",
    executed="",
)  # fmt: skip
PLAIN = drift(stage("patch embedding"), stage("block 0"), stage("logits"))
ODD = drift(
    stage("patch embedding", own=0.0, headroom=math.inf),
    stage("block 0", own=math.nan, headroom=math.nan, allowed=math.inf),
    stage("block 1", own=math.inf, headroom=0.0),
    stage("block 2", own=None, allowed=None),
    parted="block 0",
)
DRAWN = {
    "histogram": lambda: render.histogram([agreement(0.999, 0.9999, 1.0)]),
    "histogram of the same": lambda: render.histogram([agreement(1.0, 1.0), agreement(0.5)]),
    "histogram with what is no number": lambda: render.histogram([agreement(None, math.nan, 0.9)]),
    "drift": lambda: render.drift([PLAIN]),
    "drift of what is no number": lambda: render.drift([ODD, PLAIN]),
    "drift of nothing but zeros": lambda: render.drift([drift(stage("block 0", own=0.0))]),
    "headroom": lambda: render.headroom(PLAIN),
    "headroom of what is no number": lambda: render.headroom(ODD),
    "many blocks": lambda: render.drift([drift(*(stage(f"block {i}") for i in range(40)))]),
    "sizes": lambda: render.sizes([artifact(), artifact(name="other")]),
    "kinds": lambda: render.kinds(artifact(engine=ENGINE)),
    "blocks": lambda: render.per_block(artifact(engine=ENGINE)),
    "latency": lambda: render.latency(facts.Latency("", (), (), (("a", 1.5), ("b", 3.0)))),
}


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_drawn_in_colours_that_the_page_gives(name) -> None:
    svg = DRAWN[name]()
    assert svg.startswith('<svg role="img" aria-label="')
    assert "var(--ink)" in svg or "var(--soft)" in svg
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]", svg)
    assert "<metadata" not in svg


def test_the_same_figures_give_the_same_bytes() -> None:
    assert render.drift([PLAIN]) == render.drift([PLAIN])


def test_ids_of_two_plots_do_not_clash_and_references_follow() -> None:
    one, other = render.drift([PLAIN]), render.headroom(PLAIN)
    ids, others = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other))
    assert ids
    assert not ids & others
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', one)) <= ids


def test_a_name_that_is_markup_stays_text() -> None:
    svg = render.kinds(artifact(engine=ENGINE))
    assert 'aria-label="Kernels of m &amp; &lt;n>.onnx by kind"' in svg


def test_the_stage_that_parted_is_marked() -> None:
    parted = drift(stage("patch embedding"), stage("block 0", own=0.5), parted="block 0")
    assert "var(--bad)" in render.drift([parted])
    assert "var(--bad)" not in render.drift([PLAIN])


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    assert r"a$\frac{$.onnx" in render.sizes([artifact(name=r"a$\frac{$.onnx")])


def test_no_matplotlibrc_has_a_say() -> None:
    # matplotlib reads the current folder's, and TeX is a program that reads and writes files
    with mpl.rc_context({"text.usetex": True, "font.size": 40, "svg.fonttype": "path"}):
        changed = render.sizes([artifact()])
        assert mpl.rcParams["text.usetex"]
    assert changed == render.sizes([artifact()])
