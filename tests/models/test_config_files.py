"""config.json is hostile input: it makes a shape, or one message that says why not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTMSNConfig

from msn_export.errors import CheckpointError
from msn_export.models.config import VARIANTS, parse_config, parse_labels, read_json, read_labels

OURS = {"model_type": "vit_msn"}


def test_what_is_not_said_is_transformers_default() -> None:
    written = json.loads(ViTMSNConfig().to_json_string())
    assert parse_config(OURS, "c") == parse_config(written, "c") == VARIANTS["vit-msn-base"]


def test_everything_that_is_said_is_taken() -> None:
    config = parse_config(
        {
            **OURS,
            "image_size": [64, 96],
            "patch_size": [8, 16],
            "num_channels": 1,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 50,
            "hidden_act": "relu",
            "layer_norm_eps": 1e-5,
            "qkv_bias": False,
            "problem_type": "multi_label_classification",
            "id2label": {"1": "dog", "0": "cat"},
        },
        "c",
        classes=2,
    )
    assert config.to_json() == {
        "image_size": [64, 96],
        "patch_size": [8, 16],
        "channels": 1,
        "dim": 48,
        "depth": 3,
        "heads": 4,
        "mlp_dim": 50,
        "activation": "relu",
        "eps": 1e-5,
        "qkv_bias": False,
        "labels": ["cat", "dog"],
        "pooling": "cls",
        "pooled_blocks": 1,
        "problem_type": "multi_label_classification",
    }


def test_an_old_file_without_a_model_type_is_known_by_its_architecture() -> None:
    assert parse_config({"architectures": ["ViTMSNModel"]}, "c").dim == 768


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "deit"},
        "c is of model type 'deit'; expected 'vit_msn' or 'vit' (models with the architecture of "
        "ViT-MSN)",
    ),
    ({"model_type": None}, "c is of model type None; expected 'vit_msn'"),
    ({"model_type": None, "architectures": ["ViTModel"]}, "c is of model type None"),
    ({"model_type": None, "architectures": "ViTMSNModel"}, "c is of model type None"),
    ({"hidden_size": "768"}, "c: hidden_size is '768'; expected an integer"),
    ({"num_hidden_layers": True}, "c: num_hidden_layers is True; expected an integer"),
    ({"num_attention_heads": 1.5}, "c: num_attention_heads is 1.5; expected an integer"),
    ({"num_hidden_layers": 10**6}, "c: layers 1000000 is out of range; expected 1 to 1024"),
    ({"layer_norm_eps": "1e-6"}, "c: layer_norm_eps is '1e-6'; expected as in 1e-6"),
    ({"layer_norm_eps": 10**400}, "c: layer_norm_eps is 1000"),
    ({"layer_norm_eps": float("nan")}, "c: LayerNorm eps nan is out of range"),
    ({"hidden_act": 3}, "c: hidden_act must be text and qkv_bias true or false"),
    ({"problem_type": "ranking"}, "c: problem_type is 'ranking'; expected regression, single_la"),
    ({"problem_type": ["x"]}, "c: problem_type is ['x']; expected regression, single_label_class"),
    ({"qkv_bias": 1}, "c: hidden_act must be text and qkv_bias true or false"),
    ({"image_size": [224]}, "c: image_size is [224]; expected a number or [height, width]"),
    ({"image_size": [224, "x"]}, "c: image_size is [224, 'x']; expected a number or"),
    ({"patch_size": True}, "c: patch_size is True; expected a number or [height, width]"),
    ({"patch_size": 15}, "c: image height 224 is not divisible by the patch's 15"),
    ({"num_attention_heads": 5}, "c: hidden size 768 is not divisible by 5 attention heads"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_is_named(change, message) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_config({**OURS, **change}, "c")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("labels", "classes", "wanted"),
    [
        (None, 2, ("LABEL_0", "LABEL_1")),
        ({"0": "a", "1": "b"}, 2, ("a", "b")),
        ({0: "a", 1: 7}, 2, ("a", "7")),
        ({"0": "a"}, 0, ()),  # an encoder carries labels it has no classifier for
    ],
)
def test_labels_are_in_the_order_of_the_classifiers_rows(labels, classes, wanted) -> None:
    assert parse_labels({"id2label": labels}, classes, "c") == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": ["a", "b"]}, "c: id2label is no object of id to label"),
        (
            {"id2label": {"0": "a"}},
            "c: the classifier has 2 rows and id2label 1 labels: 1 id missing (1), 0 ids surplus",
        ),
        (
            {"id2label": {"1": "a", "2": "b"}},
            "c: the classifier has 2 rows and id2label 2 labels: 1 id missing (0), 1 id surplus "
            "(2)",
        ),
        (
            {"id2label": {str(i): "a" for i in range(9)}},
            "c: the classifier has 2 rows and id2label 9 labels: 0 ids missing, 7 ids surplus "
            "(2, 3, 4, 5, 6, …)",
        ),
        (
            {"id2label": {"cat": 0, "dog\x1b": 1}},
            "c: the classifier has 2 rows and id2label 2 labels: 2 ids missing (0, 1), 2 ids "
            "surplus (cat, 'dog\\x1b') (it maps labels to ids, as label2id should)",
        ),
        (
            {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 1, "dog": 0}},
            "c: id2label and label2id contradict each other at id 0 ('cat' is 1 in label2id), "
            "1 ('dog' is 0 in label2id)",
        ),
    ],
)
def test_labels_that_do_not_fit_are_named_and_can_be_replaced(config, message) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_labels(config, 2, "c")
    assert str(raised.value) == f"{message}; --labels FILE replaces them"
    given = parse_config({**OURS, **config}, "c", 2, ("x", "y"))
    assert given.labels == ("x", "y")


@pytest.mark.parametrize(
    "label2id",
    [
        {"cat": 0, "dog": "1"},
        {"LABEL_0": 0, "LABEL_1": 1},  # what transformers writes where only id2label was given
        [],
    ],
)
def test_label2id_that_contradicts_nothing_is_no_matter(label2id) -> None:
    config = {"id2label": {"0": "cat", "1": "dog"}, "label2id": label2id}
    assert parse_labels(config, 2, "c") == ("cat", "dog")


def test_labels_that_label2id_alone_has_are_read_and_held_to_the_same() -> None:
    assert parse_labels({"label2id": {"dog": 1, "cat": 0}}, 2, "c") == ("cat", "dog")
    with pytest.raises(CheckpointError, match=r"2 rows and id2label 1 labels: 1 id missing \(1\)"):
        parse_labels({"label2id": {"cat": 0}}, 2, "c")
    with pytest.raises(CheckpointError, match="2 rows and id2label 1 labels: 2 ids missing"):
        parse_labels({"label2id": {"cat": []}}, 2, "c")


def test_two_classes_may_share_a_name() -> None:
    config = {"id2label": {"0": "crane", "1": "crane"}, "label2id": {"crane": 1}}
    assert parse_labels(config, 2, "c") == ("crane", "crane")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "cat\nhot dog\n"),
        ("labels", "\ufeffcat\r\nhot dog"),
        ("labels.json", '["cat", "hot dog"]'),
        ("labels.json", '{"1": "hot dog", "0": "cat"}'),
        ("config.json", '{"hidden_size": 8, "id2label": {"0": "cat", "1": "hot dog"}}'),
    ],
)
def test_labels_are_read_from_a_file(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name, 2) == ("cat", "hot dog")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"a\nb\nc\n", "--labels l.txt has 3 labels and the classifier 2 rows"),
        ("l.txt", b"a\n\nb", "--labels l.txt: line 2 is empty; expected one label"),
        ("l.txt", b"\xff\xfe", "--labels l.txt is not text: 'utf-8' codec can't decode"),
        ("l.json", b"{", "l.json is not JSON: "),
        ("l.json", b'"a"', "--labels l.json: expected a list of labels, or an object of id to"),
        ("l.json", b'{"0": ["n01", "a"], "1": "b"}', "--labels l.json: expected a list of labels"),
        ("l.json", b'["a"]', "--labels l.json has 1 labels and the classifier 2 rows"),
        ("l.json", b'{"1": "a"}', "--labels l.json: the classifier has 2 rows and id2label 1 "),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_labels(tmp_path / name, 2)
    assert str(raised.value).replace(f"{tmp_path}{os.sep}", "").startswith(message)


def test_labels_are_for_a_classifier_and_the_file_has_to_be_there(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="l: the checkpoint has no classifier"):
        read_labels(tmp_path / "l", 0)
    with pytest.raises(CheckpointError, match="l does not exist"):
        read_labels(tmp_path / "l", 2)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantised_model_says_what_to_give_instead(method) -> None:
    with pytest.raises(CheckpointError) as raised:
        parse_config({**OURS, "quantization_config": {"quant_method": method}}, "c")
    assert str(raised.value) == (
        f"c is of a quantised model ({method}); give the checkpoint it was made from, and quantise "
        "the exported graph with msn-export calibrate"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; is this a Hugging Face model folder?"),
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff\xfe{}", "is not JSON: 'utf-8' codec can't decode"),
        (b"[1, 2]", "is not a JSON object"),
        (b"[" * 100_000, "is not JSON: "),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b" " * (16 * 2**20 + 1), "is larger than a configuration can be"),
    ],
    ids=["none", "empty", "cut off", "utf-16", "list", "deep", "long number", "large"],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content, message) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_json(path)
    assert str(raised.value).startswith(f"{path} {message}")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is missing"):
        read_json(tmp_path / "config.json")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = [
    *("architectures", "image_size", "patch_size", "num_channels", "hidden_size", "qkv_bias"),
    *("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("layer_norm_eps", "id2label", "label2id", "quantization_config"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), anything), st.integers(0, 3))
def test_whatever_is_written_there_raises_nothing_else(written, classes) -> None:
    try:
        config = parse_config({**OURS, **written}, "c", classes)
    except CheckpointError as error:
        assert str(error).startswith("c")
    else:
        assert len(config.labels) == classes
