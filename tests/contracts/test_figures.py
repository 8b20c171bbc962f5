"""The figures of pages and of README's picture are those of benchmarks/results/."""

import json
import re
from pathlib import Path

import chart
import performance
import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="there are no benchmarks here"
)


@pytest.mark.parametrize(("page", "name"), performance.PARTS, ids=lambda of: Path(of).stem)
def test_a_page_has_the_figures_of_the_results(page, name) -> None:
    text = page.read_text(encoding="utf-8")
    written = text.split(f"<!-- measured: {name} -->\n")[1].split("\n<!-- /measured -->")[0]
    again = "python scripts/performance.py writes it again"
    assert written == performance.PARTS[page, name](), f"{page.name} is stale: {again}"


@pytest.mark.parametrize("theme", chart.THEMES)
def test_the_picture_of_readme_has_the_figures_of_the_results(theme, tmp_path) -> None:
    chart.save(theme, tmp_path / "chart.svg")
    written = (chart.IMAGES / f"cpu-{theme}.svg").read_bytes()
    again = "python scripts/chart.py draws it again"
    assert written == (tmp_path / "chart.svg").read_bytes(), f"cpu-{theme}.svg is stale: {again}"


def test_the_picture_shows_the_times_and_kernels(monkeypatch) -> None:
    texts = [text.get_text() for axes in chart.draw("light").axes for text in axes.texts]
    found = performance.result("graphs")["batch 1"]
    kernels = performance.result("kernels")["graphs"]
    assert f"{found['optimum']['wall_ms']:.0f}" in texts
    assert f"{found['msn-export']['wall_ms']:.0f}" in texts
    assert f"{kernels['optimum']['kernels']}" in texts
    monkeypatch.setattr(chart, "times", lambda: {"msn-export": 1.0, "other": 7.0})
    changed = [text.get_text() for axes in chart.draw("light").axes for text in axes.texts]
    assert "7" in changed


def test_a_changed_result_makes_a_page_stale(monkeypatch) -> None:
    before = performance.graphs("graphs", "")
    found = performance.result("graphs")
    found["batch 1"]["msn-export"]["wall x optimum"] = 0.5
    monkeypatch.setattr(performance, "result", lambda name: found)
    assert performance.graphs("graphs", "") != before


def test_tools_are_compared_precision_by_precision() -> None:
    """OpenVINO by itself is named as what was measured: held to fp32."""
    rows = [line.split(" | ") for line in performance.summary().splitlines()[2:]]
    precisions = [precision.removeprefix("| ") for precision, *_ in rows]
    assert list(dict.fromkeys(precisions)) == ["fp32", "bf16", "int8"]
    assert precisions == sorted(precisions, key=["fp32", "bf16", "int8"].index)
    found = performance.result("graphs")["batch 1"]
    for precision, _, contender, *_ in rows:
        for eight in ("bf16", "int8"):
            assert (eight in contender) == (precision.removeprefix("| ") == eight), contender
    texts = performance.summary(), performance.graphs("graphs", ""), str(chart.TIMES)
    assert "bare OpenVINO" in found
    assert all(("OpenVINO alone" in text) | ("bare OpenVINO" in text) for text in texts)
    assert all(text.count("bare OpenVINO |") == 0 and "held to fp32" in text for text in texts)


def test_a_lower_precision_shows_what_it_costs_and_gains() -> None:
    rows = [line.strip("| ").split(" | ") for line in performance.precisions().splitlines()[2:]]
    found = performance.result("graphs")
    for precision, how, one, eight, cosine, _ in rows:
        assert how, precision
        assert float(one) > 0 < float(eight)
        assert float(cosine) <= 1
    least = min(found[f"batch {n}"]["msn-export int8"]["cosine"] for n in (1, 8))
    assert next(row[4] for row in rows if row[0] == "int8") == f"{least:.5f}"
    assert rows[0][:4] == ["fp32", "onnxruntime, the default", "1.00", "1.00"]


def test_a_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    found = json.loads((performance.RESULTS / "export.json").read_text(encoding="utf-8"))
    ours, theirs = found["runs"]["msn-export"], found["runs"]["optimum"]
    by_round = sorted(a["wall_s"] / b["wall_s"] for a, b in zip(ours, theirs, strict=True))
    assert found["ratios"]["msn-export"]["wall_s"] == by_round[len(by_round) // 2]


def test_the_page_of_few_labels_has_its_table_and_plot(tmp_path, monkeypatch) -> None:
    lowshot = pytest.importorskip("lowshot", reason="torch is not installed")
    results = performance.result("lowshot")
    again = "python scripts/lowshot.py --from-json writes it again"
    assert lowshot.table(results) in (ROOT / lowshot.PAGE).read_text(encoding="utf-8"), again
    monkeypatch.setattr(lowshot, "PLOT", tmp_path / "lowshot.svg")
    with lowshot.plt.rc_context():
        lowshot.draw(results)
    written = (ROOT / "docs" / "images" / "lowshot.svg").read_bytes()
    assert (tmp_path / "lowshot.svg").read_bytes() == written, again


def test_the_page_of_quantisation_has_the_same_figures() -> None:
    found = performance.result("graphs-avx2")
    page = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name in ("batch 1", "batch 8"):
        for who in ("msn-export", "msn-export int8", "optimum"):
            of = found[name][who]
            ratios = f"{of['wall x optimum']:.2f} | {of['wall x torch sdpa']:.2f}"
            start = f"| {name.removeprefix('batch ')} | {who} | {of['wall_ms']:.0f} | {ratios}"
            assert start in page, "python scripts/quantization.py writes it again"


def test_no_other_page_gives_a_ratio_to_another_tool() -> None:
    """A ratio stands in a part that a script writes, so that no two pages differ."""
    ratio = re.compile(
        r"\b[01]\.\d+ (?:times|of) (?:optimum|onnxruntime|torch|PyTorch|OpenVINO)", re.I
    )
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(
            r"<!-- measured: .*?<!-- /measured -->",
            "",
            page.read_text(encoding="utf-8"),
            flags=re.S,
        )
        assert not ratio.search(text), f"{page.name}: {ratio.search(text)}"
