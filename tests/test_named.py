"""What a user may name as a checkpoint is told, and refused, without opening it."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import CheckpointError
from msn_export.models.named import files_of, kind_of, seeded


def message_of(source: str, variant: str | None = None) -> str:
    with pytest.raises(CheckpointError) as raised:
        kind_of(source, variant)
    return str(raised.value)


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
    (tmp_path / "folder").mkdir()
    for file in ("weights.pth.tar", "no-ending"):
        (tmp_path / file).touch()
    assert kind_of(name) == kind


def test_a_variant_goes_with_a_weights_file_alone(tmp_path) -> None:
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
        ".bin, .pth, .tar, .pt), a hub id such as facebook/vit-msn-small, or random:VARIANT"
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
    code = "import sys; from msn_export import onnx_job; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
