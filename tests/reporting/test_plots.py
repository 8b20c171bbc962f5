"""A plot is drawn of whatever was measured, in the page's colours, and is named for the blind."""

import base64
import csv
import io
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
from msn_export.reporting import plots
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
    "histogram": lambda: plots.histogram([agreement(0.999, 0.9999, 1.0)]),
    "histogram of the same": lambda: plots.histogram([agreement(1.0, 1.0), agreement(0.5)]),
    "histogram with what is no number": lambda: plots.histogram([agreement(None, math.nan, 0.9)]),
    "drift": lambda: plots.drift([PLAIN]),
    "drift of what is no number": lambda: plots.drift([ODD, PLAIN]),
    "drift of nothing but zeros": lambda: plots.drift([drift(stage("block 0", own=0.0))]),
    "headroom": lambda: plots.headroom(PLAIN),
    "headroom of what is no number": lambda: plots.headroom(ODD),
    "many blocks": lambda: plots.drift([drift(*(stage(f"block {i}") for i in range(40)))]),
    "sizes": lambda: plots.sizes([artifact(), artifact("other")]),
    "kinds": lambda: plots.kinds(artifact(census=ENGINE)),
    "blocks": lambda: plots.per_block(artifact(census=ENGINE)),
    "times": lambda: plots.times(made_up()),
}


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_drawn_in_colours_that_the_page_gives(name) -> None:
    svg = DRAWN[name]().svg
    assert svg.startswith('<svg style="max-width: ')
    assert ' role="img" aria-label="' in svg
    assert "var(--ink)" in svg or "var(--soft)" in svg
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]", svg)
    assert "<metadata" not in svg


@pytest.mark.parametrize("name", DRAWN)
def test_its_labels_are_plain_text_and_no_tex(name) -> None:
    texts = re.findall(r"<text [^>]*>(.*?)</text>", DRAWN[name]().svg)
    assert texts
    assert not [text for text in texts if re.search(r"[$\\{}^]|mathdefault", text)]


def test_a_logarithmic_axis_has_the_numbers_of_its_decades() -> None:
    texts = re.findall(r"<text [^>]*>(.*?)</text>", plots.histogram([agreement(1 - 1e-7)]).svg)
    assert {"1e-7", "1e-6"} <= set(texts)
    few = drift(stage("block 0", own=2e-4, allowed=9e-4), stage("block 1", own=3e-4, allowed=9e-4))
    texts = re.findall(r"<text [^>]*>(.*?)</text>", plots.drift([few]).svg)
    assert {"0.0001", "0.0002", "0.0005", "0.001"} <= set(texts)


@pytest.mark.parametrize("name", DRAWN)
def test_its_figures_are_a_table_in_a_link(name) -> None:
    plot = DRAWN[name]()
    kind, _, packed = plot.uri.partition(",")
    assert kind == "data:text/csv;charset=utf-8;base64"
    head, *rows = csv.reader(io.StringIO(base64.b64decode(packed).decode(), newline=""))
    assert tuple(head) == plot.columns
    assert len(rows) == len(plot.rows) > 0
    assert all(len(row) == len(head) for row in rows)


def test_the_table_has_the_figures_as_they_were_measured() -> None:
    plot = plots.drift([drift(stage("block 0", own=1.25e-3), stage("block 1", own=None))])
    assert plot.csv.splitlines() == [
        "candidate,reference,stage,relative_error,allowed,parted",
        "b.onnx,a.onnx,block 0,0.00125,0.005,False",
        "b.onnx,a.onnx,block 1,,,False",
    ]


@pytest.mark.parametrize("name", ["=1+1.onnx", "+x.onnx", "-x.onnx", "@x.onnx"])
def test_a_name_is_no_formula_of_a_spreadsheet(name) -> None:
    assert f"'{name}," in plots.sizes([artifact(name)]).csv


def test_stages_around_the_blocks_are_named_one_line_lower() -> None:
    svg = plots.drift([PLAIN]).svg
    (block,) = re.findall(r'y="([\d.]+)"[^>]*>0</text>', svg)
    around = re.findall(r'translate\([\d.]+ ([\d.]+)\)">(?:patch embedding|logits)<', svg)
    assert len(around) == 2
    assert all(float(y) > float(block) + 10 for y in around)


def test_text_is_in_the_font_of_the_page() -> None:
    svg = plots.drift([PLAIN]).svg
    assert "var(--sans)" in svg
    assert "DejaVu" not in svg


def test_the_same_figures_give_the_same_bytes() -> None:
    assert plots.drift([PLAIN]) == plots.drift([PLAIN])


def test_ids_of_two_plots_do_not_clash_and_references_follow() -> None:
    one, other = plots.drift([PLAIN]).svg, plots.headroom(PLAIN).svg
    ids, others = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other))
    assert ids
    assert not ids & others
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', one)) <= ids


def test_a_name_that_is_markup_stays_text() -> None:
    svg = plots.kinds(artifact(census=ENGINE)).svg
    assert 'aria-label="Kernels of m &amp; &lt;n>.onnx by kind"' in svg


def test_the_stage_that_parted_is_marked() -> None:
    parted = drift(stage("patch embedding"), stage("block 0", own=0.5), parted="block 0")
    assert "var(--bad)" in plots.drift([parted]).svg
    assert "var(--bad)" not in plots.drift([PLAIN]).svg


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    assert r"a$\frac{$.onnx" in plots.sizes([artifact(r"a$\frac{$.onnx")]).svg


def test_no_matplotlibrc_has_a_say() -> None:
    # matplotlib reads the current folder's, and TeX is a program that reads and writes files
    with mpl.rc_context({"text.usetex": True, "font.size": 40, "svg.fonttype": "path"}):
        changed = plots.sizes([artifact()])
        assert mpl.rcParams["text.usetex"]
    assert changed == plots.sizes([artifact()])
