"""A page and a card are rendered of whatever is known, and of nothing more."""

from typing import Any

import pytest
from huggingface_hub import ModelCard

from msn_export.benchmark.results import footnotes
from msn_export.manifest import CheckpointRecord
from msn_export.reporting.gather import Page
from msn_export.reporting.render import html, markdown
from tests.builders.benches import made_up
from tests.builders.manifests import example, fit
from tests.reporting.test_plots import ENGINE, PLAIN, agreement, artifact

HUB = CheckpointRecord(f"facebook/vit-msn-small@{'0a' * 20}", "cd" * 32)


def page(**changes: Any) -> Page:
    fields: dict[str, Any] = {
        "title": "a title", "subtitle": "ViT-MSN", "written": "today", "product": "msn-export 0",
        "command": "msn-export report", "state": "passed", "headline": "All agree",
        "sentences": (), "origin": (), "artifacts": (artifact("m.onnx"),), "agreements": (),
        "drifts": (), "latency": None, "notes": (),
    }  # fmt: skip
    return Page(**{**fields, **changes})


def test_a_section_is_there_where_there_are_figures() -> None:
    assert [name for name in ("drift", "engine", "latency") if f'id="{name}"' in html(page())] == []
    whole = page(
        drifts=(PLAIN,), latency=made_up(), agreements=(agreement(0.999),),
        artifacts=(artifact("m.engine", census=ENGINE, manifest=example()),),
    )  # fmt: skip
    text = html(whole)
    assert all(f'id="{name}"' in text for name in ("drift", "engine", "latency"))
    assert text.count('<a download="') == text.count("<svg ") == 7


def test_without_a_manifest_a_card_has_no_head() -> None:
    assert markdown(page()).startswith("# a title\n")


def test_the_head_of_a_card_names_what_the_hub_sorts_by() -> None:
    known = artifact("m.onnx", manifest=example(kind="onnx", engine=None, checkpoint=HUB))
    text = markdown(page(artifacts=(known, artifact("m.engine", manifest=example()))))
    assert ModelCard(text, ignore_metadata_errors=False).data.to_dict() == {
        "base_model": "facebook/vit-msn-small",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "tensorrt", "vit_msn", "msn-export"],
    }


@pytest.mark.parametrize("title", ["a: b", "---\nlicense: mit", "{x: 1}", "- a", "# a", "'"])
def test_an_accuracy_is_in_the_head_under_whatever_title(title) -> None:
    fitted = example(kind="onnx", engine=None, fit=fit(labelled="/home/me/flowers", test=None))
    data = ModelCard(markdown(page(title=title, artifacts=(artifact(manifest=fitted),)))).data
    assert data.model_name == title
    (result,) = data.eval_results
    assert result.metric_type == "accuracy"
    assert result.dataset_name == "flowers"
    assert data.get("license") is None


def test_page_and_card_mark_noisy_rows_and_say_why() -> None:
    loaded = page(latency=made_up(load=2.8))
    text = markdown(loaded)
    rows = [line for line in text.splitlines() if line.startswith("| sdpa |")]
    assert len(rows) == 2
    assert all(row.split(" | ")[-2].endswith(r" \*") for row in rows)
    assert rows[0].startswith("| sdpa | somewhere | fp32 | 2 | 1 |")
    for line in footnotes(made_up(load=2.8)):
        assert line in html(loaded)
        assert line.replace("*", r"\*") in text
    quiet = markdown(page(latency=made_up()))
    assert "Too noisy" not in quiet
    assert r"\* |" not in quiet
