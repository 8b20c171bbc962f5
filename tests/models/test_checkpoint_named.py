"""A checkpoint's name is classified, or refused, without opening it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import CheckpointError
from msn_export.models.checkpoint import FOREIGN_FOLDERS, files_of, kind_of, near, seeded


def message_of(source: str, variant: str | None = None) -> str:
    with pytest.raises(CheckpointError) as raised:
        kind_of(source, variant)
    return str(raised.value)


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("random:vit-msn-small", "random"),
        ("random:vit-msn-base-4:7", "random"),
        ("facebook/vit-msn-small", "hub"),
        ("facebook/vit-msn-small@refs/pr/1", "hub"),
        ("folder", "folder"),
        ("weights.pth.tar", "file"),
        ("no-ending", "file"),
    ],
)
def test_a_name_is_one_of_four_kinds(tmp_path, monkeypatch, name, kind) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "folder")
    for file in ("weights.pth.tar", "no-ending"):
        (tmp_path / file).touch()
    assert kind_of(name) == kind


def test_a_variant_goes_with_a_weights_file_alone(tmp_path) -> None:
    model_folder(tmp_path)
    (tmp_path / "w.bin").touch()
    assert kind_of(str(tmp_path / "w.bin"), "vit-msn-base") == "file"
    for source in (str(tmp_path), "random:vit-msn-small", "facebook/vit-msn-small"):
        assert message_of(source, "vit-msn-base") == (
            f"checkpoint {source!r} says its own shape; --variant is for a weights file"
        )


def test_a_variant_that_is_not_known_is_refused_before_the_file_is_read(tmp_path) -> None:
    (tmp_path / "w.bin").touch()
    assert message_of(str(tmp_path / "w.bin"), "vits16").startswith("variant 'vits16' is unknown")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:", "variant '' is unknown; expected one of vit-msn-small, "),
        ("random:vits16", "variant 'vits16' is unknown; expected one of vit-msn-small, "),
        ("random:vit-msn-small:x", "is malformed; expected random:VARIANT[:SEED]"),
        ("random:vit-msn-small:-1", "is malformed; expected random:VARIANT[:SEED]"),
        ("random:vit-msn-small:1:2", "is malformed; expected random:VARIANT[:SEED]"),
        ("random:vit-msn-small:9999999999", "is malformed; expected random:VARIANT[:SEED]"),
    ],
)
def test_seeded_weights_are_named_in_one_way(source, message) -> None:
    assert message in message_of(source)


@given(seed=st.integers(0, 10**9 - 1))
def test_a_seed_is_read_back(seed) -> None:
    assert seeded(f"random:vit-msn-small:{seed}") == ("vit-msn-small", seed)
    assert seeded("random:vit-msn-small") == ("vit-msn-small", 0)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "none",
        "./none/here",
        "/none/here",
        "a/b/c",
        "weights/vits16.pth",
        "weights/vits16.pth.tar",
        "no\0ne",
        "facebook/vit-msn-small@",
        "facebook/vit msn",
    ],
)
def test_what_is_neither_there_nor_a_hub_id_lists_what_is_taken(source) -> None:
    assert message_of(source) == (
        f"checkpoint {source!r} does not exist; expected a folder, a weights file (.safetensors, "
        ".bin, .pth, .tar, .pt, .ckpt), a hub id such as facebook/vit-msn-small, or random:VARIANT"
    )


def test_a_name_that_is_too_long_is_an_error_too() -> None:
    assert message_of("a" * 5000).endswith("cannot be read: File name too long")


@given(name=st.text(max_size=80))
def test_any_text_is_a_kind_or_our_own_error(name) -> None:
    try:
        assert kind_of(name) in {"random", "file", "folder", "hub"}
    except CheckpointError as error:
        assert str(error).startswith(("checkpoint ", "variant "))


def test_the_files_that_loading_may_read_are_listed(tmp_path) -> None:
    read = {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    for name in (*read, "m.onnx", "m.onnx.json", "README.md"):
        (tmp_path / name).touch()
    assert {path.name for path in files_of(str(tmp_path))} == read
    weights = tmp_path / "model-00001-of-00002.safetensors"
    assert files_of(str(weights)) == [
        weights, tmp_path / "config.json", tmp_path / "preprocessor_config.json",
        tmp_path / "processor_config.json",
    ]  # fmt: skip
    assert files_of("random:vit-msn-small") == files_of("facebook/vit-msn-small") == []


def test_it_loads_no_torch() -> None:
    code = "import sys; from msn_export.commands import jobs; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# --- folders that are no model --------------------------------------------------------------------


def folder_message(folder: Path) -> str:
    return message_of(str(folder)).replace(str(folder), "RUN")


def test_an_adapter_names_its_base_and_how_to_merge_it(tmp_path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": "facebook/vit-msn-small", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "adapter_model.safetensors").touch()
    said = (
        "checkpoint RUN is a PEFT adapter (LORA) of 'facebook/vit-msn-small', not a whole model; "
        "load it with peft, call merge_and_unload(), then save_pretrained(), and give that folder"
    )
    assert folder_message(tmp_path) == said
    # transformers would put the adapter on the weights beside it
    model_folder(tmp_path)
    assert folder_message(tmp_path) == (
        f"{said}; if its weights are merged already, remove adapter_config.json"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "RUN is a PEFT adapter, not a whole model" in folder_message(tmp_path)


def test_a_trainers_folder_names_its_last_checkpoint_or_the_best(tmp_path) -> None:
    for step in (500, 1000, 20):
        model_folder(tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    assert folder_message(tmp_path) == (
        "checkpoint RUN is no model but holds checkpoint-20, checkpoint-500, checkpoint-1000; did "
        "you mean RUN/checkpoint-1000?"
    )
    state = tmp_path / "checkpoint-1000" / "trainer_state.json"
    state.write_text(json.dumps({"best_model_checkpoint": "/elsewhere/checkpoint-500"}))
    assert folder_message(tmp_path).endswith("did you mean RUN/checkpoint-500?")
    state.write_text(json.dumps({"best_model_checkpoint": "/elsewhere/checkpoint-7"}))
    assert folder_message(tmp_path).endswith("did you mean RUN/checkpoint-1000?")


@pytest.mark.parametrize("foreign", FOREIGN_FOLDERS, ids=lambda foreign: foreign.sign)
def test_a_folder_in_another_format_says_which(tmp_path, foreign) -> None:
    (tmp_path / foreign.sign.replace("*", "x")).touch()
    (tmp_path / "config.json").write_text("{}")
    assert folder_message(tmp_path) == f"checkpoint RUN {foreign.what}"
    model_folder(tmp_path)  # with weights of ours beside it that is no matter
    assert kind_of(str(tmp_path)) == "folder"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json and no weights; expected a Hugging Face model folder"),
        (
            ["config.json"],
            "holds no weights; expected one of model.safetensors, pytorch_model.bin, "
            "model.safetensors.index.json, pytorch_model.bin.index.json",
        ),
        (
            ["pytorch_model.bin"],
            "has weights and no config.json; put that beside them, or give the file "
            "RUN/pytorch_model.bin",
        ),
        (
            ["checkpoint-98.pth", "checkpoint-99.pth", "log.txt"],
            "is no Hugging Face model folder; give one of its files, as in RUN/checkpoint-99.pth",
        ),
    ],
)
def test_a_folder_that_is_not_whole_says_what_it_lacks(tmp_path, files, message) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert folder_message(tmp_path) == f"checkpoint RUN {message}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/checkpoint-50", "runs/checkpoint-500"),
        ("run/checkpoint-500", "runs/checkpoint-500"),
        ("runs/checkpoint-500/modle.safetensors", "runs/checkpoint-500/model.safetensors"),
    ],
)
def test_a_mistyped_path_is_met_with_the_nearest(tmp_path, monkeypatch, typed, meant) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "runs" / "checkpoint-500")
    assert near(typed) == f"; did you mean {meant}?"
    assert near(str(tmp_path / typed)) == f"; did you mean {tmp_path / meant}?"
    assert message_of(f"./{typed}").endswith(f"or random:VARIANT; did you mean {meant}?")


@pytest.mark.parametrize("typed", ["", "elsewhere/vit", "facebook/vit-msn-small"])
def test_nothing_near_is_no_suggestion(tmp_path, monkeypatch, typed) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert near(typed) == ""
