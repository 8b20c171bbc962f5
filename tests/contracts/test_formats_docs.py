"""The page of formats is what the tables say, and the tables are what the code does."""

from dataclasses import replace
from pathlib import Path

import formats
import pytest
import torch

from msn_export.models.config import READS, VARIANTS
from msn_export.models.state_dict import LAYOUTS, canonical, with_classifier
from msn_export.processor_config import FIELDS

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_current() -> None:
    written = (ROOT / formats.PAGE).read_text(encoding="utf-8")
    assert written == formats.page(), "python scripts/formats.py writes it again"


def test_the_page_names_every_row() -> None:
    page = formats.page()
    assert all(layout.writers in page for layout in LAYOUTS)
    assert all(f"| `{field.name}` | {field.treatment} |" in page for field in FIELDS)
    assert all(READS[one.pooling] in page for one in formats.CLASSIFIERS)
    # fit alone makes a classifier of features; no checkpoint holds one
    assert {one.pooling for one in formats.CLASSIFIERS} == set(READS) - {"features"}
    assert all(f"| {form.name} | {form.verdict} |" in page for form in formats.FORMS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.writers)
def test_every_name_of_a_layout_is_read(layout) -> None:
    for name, ours in layout.inside.items():
        assert canonical(f"{layout.block.replace('N', '3')}{name}.bias") == f"blocks.3.{ours}.bias"
    for name, ours in layout.outside.items():
        leaf = "" if ours in {"cls_token", "pos_embed"} else ".weight"
        assert canonical(f"{name}{leaf}") == f"{ours}{leaf}"


@pytest.mark.parametrize("classifier", formats.CLASSIFIERS, ids=lambda one: " ".join(one.modules))
def test_every_classifier_reads_what_its_row_says(classifier) -> None:
    tensors = {f"{name}.weight": torch.zeros(3, 384) for name in classifier.modules}
    config = replace(VARIANTS["vit-msn-small"], labels=("a", "b", "c"))
    assert with_classifier(tensors, config, "x").pooling == classifier.pooling
