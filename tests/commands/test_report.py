"""``msn-export report``: one page that loads nothing and says of each artifact what is known."""

import base64
import csv
import itertools
import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import report_screenshot
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from PIL import Image

from msn_export import manifest as manifests
from msn_export.cli import main
from msn_export.compare import streams
from msn_export.graph import blocks, io
from msn_export.graph.blocks import find_stream
from msn_export.manifest import CheckpointRecord, manifest_path
from msn_export.metrics import evaluate
from msn_export.reporting.describe import significant
from msn_export.runtime import onnxruntime
from msn_export.schema import to_plain
from tests.builders.artifacts import classifier, copy_of, engine, no_driver
from tests.builders.benches import made_up
from tests.builders.checkpoints import hugging_face
from tests.builders.pages import read
from tests.builders.tiny_artifacts import pictures, predicted
from tests.contracts import faults
from tests.fakes.browser import chromium, look_at

ENGINE_KINDS = 2  # plots of an engine: its kernels by kind, and by block
PLOTS = 4 + ENGINE_KINDS + 1  # sizes, cosines, drift, headroom; the engine's; latency
PICTURES = 3 * 3  # the worst three, each with its neighbour on either side


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = report(*arguments)
    assert result.exit_code == 1, result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three artifacts of one model: fp32, fp16 and engine, with pictures and a benchmark."""
    folder = tmp_path_factory.mktemp("report")
    pictures(folder / "images", 6)
    copy_of(classifier(), folder)
    copy_of(engine(), folder)
    options = ["--dtype", "fp16", "--images", str(folder / "images")]
    checkpoint = str(classifier().parent / "hf")
    made = CliRunner().invoke(main, ["onnx", checkpoint, "-o", str(folder / "half.onnx"), *options])
    assert made.exit_code == 0, made.output
    (folder / "bench.json").write_text(json.dumps(to_plain(made_up())))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    artifacts = [folder / name for name in ("m.onnx", "half.onnx", "m.engine")]
    more = ["--images", folder / "images", "--bench", folder / "bench.json"]
    output = folder / "report.html"
    result = report(*artifacts, *more, "-o", output, "--markdown", folder / "card.md")
    assert result.exit_code == 0, result.output
    assert "Everything that ran agrees; m.engine did not run" in " ".join(result.stdout.split())
    return output


# --- the file -------------------------------------------------------------------------------------


def test_it_holds_all_it_shows_and_is_small(page) -> None:
    text, reader = page.read_text(encoding="utf-8"), read(page)
    assert all(target.startswith(("#", "data:")) for target in reader.fetched)
    assert not re.search(r"@import|url\((?!#)|<script|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert "default-src 'none'" in text
    assert reader.tags.count("svg") == PLOTS
    assert reader.tags.count("img") == PICTURES
    assert len(reader.ids) == len(set(reader.ids))
    assert page.stat().st_size < 2_000_000


def test_its_plots_are_in_the_colours_of_the_page(page) -> None:
    text = page.read_text(encoding="utf-8")
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert all("var(--" in svg for svg in svgs)
    assert not any(re.search(r"#0[1-9]0[1-9]0[1-9]", svg) for svg in svgs)
    assert all('role="img" aria-label="' in svg for svg in svgs)


def text_of(page: Path) -> str:
    body = re.sub(r"<(style|svg).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_it_says_where_each_came_from_and_how_to_make_it_again(page, folder) -> None:
    text = text_of(page)
    for name in ("m.onnx", "half.onnx", "m.engine"):
        digest = json.loads((folder / f"{name}.json").read_text())["sha256"]
        assert f"sha256 {digest}" in text
    assert "weights&#39; sha256" in text
    assert "msn-export" in text[text.index("How to make it again") :]
    assert "preprocessor_config.json: resized to 32x32 (bilinear)" in text


def test_it_shows_agreement_with_the_worst_images_beside_their_neighbours(page) -> None:
    text = text_of(page)
    assert "half.onnx agrees with m.onnx on 6 images" in text
    assert "fp16: relative error at most " in text
    assert "(measured: 1.5 times the errors of " in text  # validate's limit, and no fixed number
    assert "first-percentile cosine at least 0.999" not in text
    assert "same neighbour image a/" in text or "same neighbour image b/" in text
    assert text.count("reference&#39;s neighbour") == text.count("candidate&#39;s neighbour") == 3
    assert "The images that agree least" in text


def test_of_a_large_set_it_says_which_images_the_worst_are_of(
    folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(evaluate.draw_parts.__kwdefaults__, "part", 4)
    given = (folder / "m.onnx", folder / "half.onnx", "--images", folder / "images")
    report(*given, "-o", tmp_path / "report.html")
    assert "The images of the first 4 that agree least" in text_of(tmp_path / "report.html")


def test_an_engine_that_did_not_run_is_never_said_to_agree(page) -> None:
    text = text_of(page)
    assert "typed graph of m.engine agrees with m.onnx" in text
    assert not re.search(r"(?<!typed graph of )m\.engine agrees", text)
    assert "m.engine TensorRT engine fp16" in text
    assert "compiled, not run" in text
    assert f"m.engine was not run for this report: {engine().parent.name}" not in text
    assert no_driver() in text


def test_it_shows_drift_census_precision_and_times(page) -> None:
    text = text_of(page)
    assert "No stage parts; block " in text
    assert "Below the dashed line (4) a value is kept in fp32" in text
    assert re.search(r"\d\d kernels 2 of 2 attention kernels fused 9 fp16 matrix", text)
    assert text.count(" attention fp16 ") == 2  # a kernel each block
    assert "qkv" in text[text.index("Precision") :]
    assert "median ms" in text
    assert significant(made_up().timings[0].median_ms, 4) in text


def test_the_model_card_has_the_same_figures(page, folder) -> None:
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "**Everything that ran agrees; m.engine did not run**" in card
    for heading in ("Artifacts", "Agreement", "Drift", "Engine", "Latency", "Origin", "Notes"):
        assert f"\n## {heading}\n" in card
    assert "| m.engine | TensorRT engine | fp16 |" in card
    assert "```console\n$ " in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    for head, rule in itertools.pairwise(tables):
        if rule.startswith("|---"):
            assert head.count("|") == rule.count("|")
    assert "\n\n\n" not in card


def test_the_hub_reads_the_head_of_the_model_card(folder, page) -> None:
    card = ModelCard.load(folder / "card.md", ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "tensorrt", "vit_msn", "msn-export"],
    }
    assert card.text.lstrip().startswith("# ")


# --- what it reads --------------------------------------------------------------------------------


def test_each_file_is_read_hashed_and_searched_once(folder, tmp_path, monkeypatch) -> None:
    """Each graph is read by us once and by onnxruntime once, whatever is said of it."""
    counts: dict[str, Counter[str]] = {
        what: Counter() for what in ("read", "run", "hash", "manifest")
    }

    def counted(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def call(path: Path, *given: Any, **options: Any) -> Any:
            if Path(path).parent == folder:
                counts[what][Path(path).name] += 1
            return original(path, *given, **options)

        monkeypatch.setattr(module, name, call)

    counted(io, "load", "read")
    counted(onnxruntime, "open_session", "run")
    counted(manifests, "_hash", "hash")
    counted(manifests, "read_unverified", "manifest")
    manifests._hash_once.cache_clear()
    searched: list[ir.Model] = []

    def search(model: ir.Model) -> Any:
        searched.append(model)
        return find_stream(model)

    for module in (blocks, streams):
        monkeypatch.setattr(module, "find_stream", search)
    no_driver()  # where there is one, the engine is read again to run what was verified
    names = ("m.onnx", "half.onnx", "m.engine")
    files = [folder / name for name in names]
    result = report(*files, "--images", folder / "images", "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert counts["read"] == counts["run"] == {"m.onnx": 1, "half.onnx": 1}
    assert counts["hash"] == dict.fromkeys(names, 1)
    assert counts["manifest"] == {f"{name}.json": 1 for name in names}
    assert len({id(model) for model in searched}) == len(searched)
    assert len(searched) == 4  # theirs, and of the graphs that say what a precision costs


# --- in a browser ---------------------------------------------------------------------------------


def colours(opened: Any) -> tuple[str, str]:
    style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    background, ink = opened.execute_script(style)
    return background, ink


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_whole_without_an_error_and_fetches_nothing(page, dark) -> None:
    with chromium(dark=dark) as opened:
        look_at(opened, page)
        assert opened.get_log("browser") == []
        requested = [
            json.loads(entry["message"])["message"]["params"]["request"]["url"]
            for entry in opened.get_log("performance")
            if '"Network.requestWillBeSent"' in entry["message"]
        ]
        assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
        sizes = opened.execute_script(
            "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect())"
            ".map(r => [r.width, r.height])"
        )
        assert len(sizes) == PLOTS
        assert all(width > 200 and height > 30 for width, height in sizes)
        loaded = opened.execute_script(
            "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
        )
        assert loaded == [True] * PICTURES
        expected = "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
        assert colours(opened)[0] == expected
        # ink in a plot is the page's own: light on dark, dark on light
        inks = opened.execute_script(
            "return [...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"
        )
        assert inks
        brightness = [np.mean([int(n) for n in re.findall(r"\d+", ink)[:3]]) for ink in inks]
        assert min(brightness) > 110 if dark else max(brightness) < 110


@pytest.mark.parametrize("width", [1200, 500, 390])
def test_nothing_sticks_out_of_a_desktop_or_a_phone(page, width) -> None:
    with chromium(width) as opened:
        look_at(opened, page)
        assert opened.execute_script("return innerWidth") == width
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width


def test_text_in_plots_is_readable_on_a_narrow_page(page) -> None:
    with chromium(500) as opened:
        look_at(opened, page)
        heights = opened.execute_script(
            "return [...document.querySelectorAll('svg text')]"
            ".map(e => [getComputedStyle(e).fontSize, e.getScreenCTM()])"
            ".map(([size, to]) => parseFloat(size) * Math.hypot(to.a, to.b))"
        )
        assert len(heights) > 50
        assert min(heights) >= 8  # pixels; numbers above bars are smaller than the rest
        assert np.median(heights) >= 10


def test_what_runs_it_wraps_between_words(page) -> None:
    with chromium(500) as opened:
        look_at(opened, page)
        widths = opened.execute_script(
            "return [...document.querySelectorAll('td.words')]"
            ".map(e => e.getBoundingClientRect().width)"
        )
        assert len(widths) == 3
        assert min(widths) >= 250  # pixels: several words a line


def test_the_data_of_each_plot_can_be_downloaded(page, tmp_path) -> None:
    with chromium() as opened:
        folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
        opened.execute_cdp_cmd("Page.setDownloadBehavior", folder)
        look_at(opened, page)
        links = opened.find_elements("css selector", "figcaption a[download]")
        assert len(links) == PLOTS
        names = [link.get_attribute("download") for link in links]
        for link in links:
            link.click()
        for _ in range(100):
            if {path.name for path in tmp_path.iterdir()} == set(names):
                break
            time.sleep(0.1)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        assert opened.get_log("browser") == []
    rows = list(csv.DictReader((tmp_path / "cosines.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 2 + 6 + 6  # the noise that m.onnx was checked on; the images
    assert {row["candidate"] for row in rows} == {"m.onnx", "half.onnx", "typed graph of m.engine"}
    assert all(float(row["cosine"]) > 0.999 for row in rows)


def test_the_picture_of_the_readme_is_taken_of_it(page, tmp_path) -> None:
    report_screenshot.main(page, tmp_path / "images" / "report.png")
    with Image.open(tmp_path / "images" / "report.png") as picture:
        assert picture.size == (report_screenshot.WIDTH, report_screenshot.HEIGHT)
        assert len(picture.convert("RGB").getcolors(256)) > 50
    with pytest.raises(SystemExit, match="make report writes it"):
        report_screenshot.main(tmp_path / "none.html", tmp_path / "none.png")


def test_it_prints_light_and_whole_from_a_dark_screen(page) -> None:
    with chromium(dark=True) as opened:
        look_at(opened, page)
        scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": scheme})
        assert colours(opened) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
        hidden = "return getComputedStyle(document.querySelector('nav')).display"
        assert opened.execute_script(hidden) == "none"
        closed = opened.execute_script(
            "return [...document.querySelectorAll('details > :not(summary)')]"
            ".filter(e => e.getBoundingClientRect().height < 5).length"
        )
        assert closed == 0  # what folds on a screen is open on paper
        printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
        pdf = base64.b64decode(printed)
        assert pdf.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2


# --- what it says of what fails -------------------------------------------------------------------


def test_an_artifact_that_does_not_agree_is_shown_and_fails(folder, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "blocks.1.mlp.fc2.weight", lambda w: -w)

    wrong = faults.plant(folder / "m.onnx", tmp_path / "wrong.onnx", spoil)
    output = tmp_path / "report.html"
    result = report(folder / "m.onnx", wrong, "--images", folder / "images", "-o", output)
    assert result.exit_code == 1
    assert "wrong.onnx: not what the reference is" in " ".join(result.stdout.split())
    text = text_of(output)
    assert "wrong.onnx does not agree with m.onnx on 6 images" in text
    assert "wrong.onnx parts from m.onnx at block 1" in text
    assert "Every tensor inside block 1" in text


def test_what_is_no_number_is_shown_as_such(folder, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "classifier.bias", lambda bias: bias * np.float32(np.nan))

    wrong = faults.plant(folder / "m.onnx", tmp_path / "wrong.onnx", spoil)
    options = ("--images", folder / "images", "--markdown", tmp_path / "card.md")
    result = report(folder / "m.onnx", wrong, *options, "-o", tmp_path / "report.html")
    assert result.exit_code == 1
    text = text_of(tmp_path / "report.html")
    assert "not a number" in text
    assert "NaN" in text
    assert "| not a number |" in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_a_manifest_of_another_file_is_an_error_row_and_quoted_nowhere(folder, tmp_path) -> None:
    graph = copy_of(folder / "m.onnx", tmp_path)
    other = tmp_path / "half.onnx"
    other.write_bytes((folder / "half.onnx").read_bytes())
    manifest_path(other).write_bytes(manifest_path(graph).read_bytes())
    output = tmp_path / "report.html"
    for options in ((), ("--images", folder / "images")):
        result = report(graph, other, *options, "-o", output, "--force")
        assert result.exit_code == 1
        assert "half.onnx: the manifest is not believed" in " ".join(result.stdout.split())
        text = text_of(output)
        assert f"{other} is not the file its manifest describes (" in text
        assert re.search(r"half\.onnx ONNX graph fp16 [^A-Z]* of 2 \S.*? not believed", text)
        assert "half.onnx agrees" not in text
        assert "Everything that ran agrees" not in text


def test_a_damaged_manifest_is_one_too(folder, tmp_path) -> None:
    graph = copy_of(folder / "m.onnx", tmp_path)
    manifest_path(graph).write_text("{")
    result = report(folder / "half.onnx", graph, "-o", tmp_path / "report.html")
    assert result.exit_code == 1
    assert "m.onnx: the manifest is not believed" in " ".join(result.stdout.split())
    assert f"{manifest_path(graph)} is not JSON" in text_of(tmp_path / "report.html")


def test_what_was_checked_against_another_graph_of_that_name_is_stale(folder, tmp_path) -> None:
    compiled = copy_of(folder / "m.engine", tmp_path)
    graph = tmp_path / "m.onnx"
    faults.plant(folder / "m.onnx", graph, lambda m: faults.edit(m, "classifier.bias", np.abs))
    result = report(graph, compiled, "-o", tmp_path / "report.html")
    assert result.exit_code == 1
    told = "m.engine: made from another graph or checkpoint than the one here"
    assert told in " ".join(result.stdout.split())
    text = text_of(tmp_path / "report.html")
    assert re.search(
        r"m\.engine was made from another m\.onnx \(sha256 \w{12}…, this one has", text
    )
    assert "m.engine agrees" not in text


def test_without_images_a_checkpoint_is_known_by_its_weights(folder, tmp_path) -> None:
    own, other = classifier().parent / "hf", tmp_path / "other"
    hugging_face(other, labels=3, seed=1)
    result = report(own, folder / "m.onnx", folder / "half.onnx", "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    result = report(other, folder / "m.onnx", "-o", tmp_path / "other.html")
    assert result.exit_code == 1
    told = "m.onnx: made from another graph or checkpoint than the one here"
    assert told in " ".join(result.stdout.split())
    assert re.search(
        r"m\.onnx was made from another checkpoint, .*hf \(sha256 \w{12}…, this one has",
        text_of(tmp_path / "other.html"),
    )


def test_without_images_it_says_what_the_manifests_say(folder, tmp_path) -> None:
    result = report(folder / "m.onnx", "-o", tmp_path / "report.html")
    assert result.exit_code == 0
    text = text_of(tmp_path / "report.html")
    assert "nothing was run for this report: --images compares the artifacts on pictures" in text
    assert "when it was made, as its manifest says" in text


def test_a_checkpoint_can_be_the_reference(folder, tmp_path) -> None:
    checkpoint = classifier().parent / "hf"
    options = ("--images", folder / "images", "-o", tmp_path / "report.html")
    result = report(checkpoint, folder / "m.onnx", *options)
    assert result.exit_code == 0, result.output
    assert "Every artifact agrees with its reference" in text_of(tmp_path / "report.html")


def test_a_name_that_is_markup_stays_text(folder, tmp_path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>|`.onnx"
    faults.describe(folder / "m.onnx", hostile)
    output, card = tmp_path / "report.html", tmp_path / "card.md"
    result = report(hostile, "-o", output, "--markdown", card, "--title", "<script>")
    assert result.exit_code == 0, result.output
    assert not {"img", "script"} & set(read(output).tags)
    assert r"\<img src=x onerror=alert(1)\>\|\`.onnx" in card.read_text(encoding="utf-8")


def test_nor_is_what_a_manifest_says_markdown(folder, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((folder / "m.onnx").read_bytes())
    read = manifests.read(folder / "m.onnx")
    assert read is not None
    source = CheckpointRecord("x\n\n# Verified <b>", "cd" * 32)
    hostile = replace(read, checkpoint=source, config={"depth": "<script>", "dim": "|"})
    manifest_path(path).write_text(manifests.seal(hostile), encoding="utf-8")
    card = tmp_path / "card.md"
    result = report(path, "-o", tmp_path / "report.html", "--markdown", card)
    assert result.exit_code == 0, result.output
    lines = ModelCard.load(card).text.lstrip().splitlines()
    assert lines[0] == r"# x \# Verified \<b\>"
    assert lines[2].startswith(r"ViT-MSN, \<script\> blocks of \| with")


def test_it_shows_the_accuracy_on_labelled_pictures(folder, tmp_path) -> None:
    labelled = predicted(tmp_path / "set", folder / "m.onnx", 36)
    output, card = tmp_path / "report.html", tmp_path / "card.md"
    options = ("--labelled", labelled, "-o", output, "--markdown", card)
    result = report(folder / "m.onnx", folder / "half.onnx", *options)
    assert result.exit_code == 0, result.output
    text = text_of(output)
    assert "100.0% (90.4% to 100.0%) in the reference by logits on 36 images of " in text
    assert "36 of " in text  # the outputs are compared on the same pictures
    assert "no significant loss: 0 lost, 0 gained, McNemar&#39;s exact test p = 1" in text
    assert "  * accuracy 100.0% (90.4% to 100.0%) in the candidate" in card.read_text("utf-8")


def test_the_pictures_of_a_table_of_labels_are_compared_on(folder, tmp_path) -> None:
    labelled = predicted(tmp_path / "set", folder / "m.onnx", 6)
    pictures = sorted(labelled.rglob("*.png"))
    table = tmp_path / "labels.csv"
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in pictures]
    table.write_text("path,label\n" + "\n".join(rows))
    output = tmp_path / "report.html"
    result = report(folder / "m.onnx", folder / "half.onnx", "--labelled", table, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"in the reference by logits on 6 images of {table}" in text_of(output)


def test_pictures_that_compare_nothing_are_said(folder, tmp_path) -> None:
    labelled = predicted(tmp_path / "set", folder / "m.onnx", 6)
    output = tmp_path / "report.html"
    result = report(folder / "m.onnx", "--labelled", labelled, "-o", output)
    assert result.exit_code == 0, result.output
    note = f"{labelled} was not run: pictures compare two artifacts that run here"
    assert note in text_of(output)


# --- what is refused ------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_no_artifact_ever(folder, tmp_path) -> None:
    (tmp_path / "report.html").write_text("mine")
    assert "exists" in refused(folder / "m.onnx", "-o", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "mine"
    graph = copy_of(folder / "m.onnx", tmp_path)
    before = graph.read_bytes()
    for options in (["-o", graph], ["-o", tmp_path / "new.html", "--markdown", graph]):
        result = report(graph, *options, "--force")
        assert result.exit_code == 2
        assert "does not end in" in result.stderr
    assert graph.read_bytes() == before
    assert not (tmp_path / "new.html").exists()


def test_a_report_of_a_checkpoint_alone_is_refused(tmp_path) -> None:
    message = refused(classifier().parent / "hf", "-o", tmp_path / "report.html")
    assert message == "error: a report needs at least one exported file, .onnx or .engine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["r[/b].html", "[red]x.html", r"a\q\1.html"])
def test_a_name_is_printed_as_it_is(folder, tmp_path, name) -> None:
    artifact = tmp_path / name.replace("html", "onnx")
    artifact.parent.mkdir(exist_ok=True)  # [/b] is a folder called [
    artifact.write_bytes((folder / "m.onnx").read_bytes())
    result = report(artifact, "-o", tmp_path / name)
    assert result.exit_code == 0, result.output
    assert name in "".join(result.stdout.split("\n"))
    assert (tmp_path / name).is_file()


def test_what_does_not_exist_is_named(tmp_path) -> None:
    result = report(tmp_path / "a.onnx", "-o", tmp_path / "r.html")
    assert result.exit_code == 2
    assert f"'{tmp_path / 'a.onnx'}' does not exist" in result.stderr


@pytest.mark.parametrize(
    ("what", "package"),
    [("a report", "jinja2"), ("a report", "matplotlib"), ("a model card", "huggingface_hub")],
)
def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it(
    what, package, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ("-o", tmp_path / "r.html", "--markdown", tmp_path / "card.md")
    assert refused(folder / "m.onnx", *options) == (
        f"error: {what} needs {package}, which is not installed; pip install 'msn-export[report]'"
    )
