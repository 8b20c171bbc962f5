"""A plot is drawn of whatever was measured, in the page's colours, and is named for the blind."""

import math
import re
from typing import Any

import matplotlib as mpl
import pytest

from msn_export.compare.drift import Drift
from msn_export.compare.inspection import Inspection
from msn_export.engine.census import Census
from msn_export.engine.kernels import Kernel
from msn_export.manifest import ImageRecord
from msn_export.metrics.diagnose import OwnError, StageDrift, TensorDrift
from msn_export.reporting import render
from msn_export.reporting.gather import ReportedAgreement, ReportedArtifact
from msn_export.spec import Dtype
from tests.builders.benches import made_up
from tests.builders.manifests import check


def stage(
    name: str, own: float | None = 1e-3, allowed: float = 5e-3, peak: float = 4.0
) -> StageDrift:
    tensor = TensorDrift(name, 1.0, 1.0, 1e-3, 1e-3, peak, 0, 0)
    error = None if own is None else OwnError(name, own, 1e-3, allowed)
    return StageDrift(tensor, error, peak, name)


def drift(*stages: StageDrift, parted: str | None = None) -> Drift:
    return Drift(
        "a.onnx", "b.onnx", Dtype.FP16, stages, parted, parted, (), check(), "measured", ()
    )


def agreement(*cosines: float | None) -> ReportedAgreement:
    images = tuple(ImageRecord(f"{i}.png", c, 0.0) for i, c in enumerate(cosines))
    return ReportedAgreement("b.onnx", "a.onnx", check(per_image=images), "fp16")


def artifact(
    name: str = "m & <n>.onnx", verdict: Any = "passed", **changes: Any
) -> ReportedArtifact:
    return ReportedArtifact(Inspection(name, "onnx", 43_000_000, "ab", "", ""), verdict, **changes)


ENGINE = Census((
    Kernel("a", "kgen", ("Half",), ("Half",), layers=("/blocks.0/Attention",)),
    Kernel("b", "gemm", ("Half", "Half"), ("Half",), layers=("/blocks.0/fc1/MatMul",)),
))  # fmt: skip
PLAIN = drift(stage("patch embedding"), stage("block 0"), stage("logits"))
ODD = drift(
    stage("patch embedding", own=0.0, peak=0.0),
    stage("block 0", own=math.nan, peak=math.nan, allowed=math.inf),
    stage("block 1", own=math.inf, peak=math.inf),
    stage("block 2", own=None),
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
    "sizes": lambda: render.sizes([artifact(), artifact("other")]),
    "kinds": lambda: render.kinds(artifact(census=ENGINE)),
    "blocks": lambda: render.per_block(artifact(census=ENGINE)),
    "latency": lambda: render.latency(made_up()),
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
    svg = render.kinds(artifact(census=ENGINE))
    assert 'aria-label="Kernels of m &amp; &lt;n>.onnx by kind"' in svg


def test_the_stage_that_parted_is_marked() -> None:
    parted = drift(stage("patch embedding"), stage("block 0", own=0.5), parted="block 0")
    assert "var(--bad)" in render.drift([parted])
    assert "var(--bad)" not in render.drift([PLAIN])


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    assert r"a$\frac{$.onnx" in render.sizes([artifact(r"a$\frac{$.onnx")])


def test_no_matplotlibrc_has_a_say() -> None:
    # matplotlib reads the current folder's, and TeX is a program that reads and writes files
    with mpl.rc_context({"text.usetex": True, "font.size": 40, "svg.fonttype": "path"}):
        changed = render.sizes([artifact()])
        assert mpl.rcParams["text.usetex"]
    assert changed == render.sizes([artifact()])
