"""A card says what the hub asks for, and nothing that a file's text could make it say."""

import pytest
import yaml
from huggingface_hub import ModelCard

from msn_export.manifest import CheckpointRecord
from msn_export.reporting.hub_card import HubCard, hub_id
from msn_export.spec import Dtype, TensorSpec
from tests.builders.manifests import example, fit


def card(**changes: object) -> HubCard:
    known = example(**{"kind": "onnx", "engine": None, "target": "portable", "opset": 17,
                       "fit": None, "dtype": Dtype.FP32, **changes})  # fmt: skip
    return HubCard("me/model", {Dtype.FP32: known}, "facebook/tiny", ("assumed: <b>hf</b>",))


def front(card: HubCard) -> dict:
    """Read the head as the hub's own library does, which drops what it does not know."""
    found = yaml.safe_load(str(card).split("---\n")[1])
    assert isinstance(found, dict)
    assert ModelCard(str(card), ignore_metadata_errors=False).data.to_dict() == found
    return found


def test_the_base_model_is_named_and_nothing_is_claimed_that_was_not_measured() -> None:
    assert front(card()) == {
        "base_model": "facebook/tiny",
        "library_name": "transformers.js",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "vit_msn", "msn-export"],
    }


def test_an_accuracy_that_was_measured_is_in_the_metadata() -> None:
    found = front(card(fit=fit(labelled="/home/me/flowers", test=None)))
    assert found["metrics"] == ["accuracy"]
    assert found["model-index"][0]["name"] == "model"
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"]["name"] == "flowers"
    assert "/home/me" not in str(card(fit=fit(labelled="/home/me/flowers")))


@pytest.mark.parametrize(
    ("output", "task", "auto"),
    [
        ("logits", "image-classification", "ORTModelForImageClassification"),
        ("last_hidden_state", "image-feature-extraction", "ORTModelForFeatureExtraction"),
    ],
)
def test_its_task_and_its_lines_of_code_are_those_of_its_output(output, task, auto) -> None:
    text = str(card(outputs=(TensorSpec(output, "float", ("batch", 3)),)))
    assert f"pipeline_tag: {task}" in text
    assert f'pipeline("{task}", "me/model"' in text
    assert f'{auto}.from_pretrained("me/model", subfolder="onnx", file_name="model.onnx")' in text


def test_a_note_is_text_and_names_no_folder_of_this_machine() -> None:
    text = str(card(notes=("skipped: /home/me/a.png", "line\nbreak `x` |")))
    assert "assumed: \\<b\\>hf\\</b\\>" in text
    assert "* skipped: a.png" in text
    assert "* line break \\`x\\` \\|" in text


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (f"facebook/vit-msn-small@{'0a' * 20}", "facebook/vit-msn-small"),
        ("facebook/vit-msn-small", None),  # a folder of that name
        (f"/home/me/facebook/vit@{'0a' * 20}", None),
        ("random:vit-msn-small:0", None),
    ],
)
def test_a_checkpoint_from_the_hub_is_known_by_its_revision(source, found) -> None:
    known = example(checkpoint=CheckpointRecord(source, "cd" * 32))
    assert hub_id(known) == found
