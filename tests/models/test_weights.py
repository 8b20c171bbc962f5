"""Weights files are hostile input: nothing in them runs, and no index leaves its folder."""

import argparse
import json
import os
import pickle
import random
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msn_export.errors import CheckpointError
from msn_export.models.weights import Weights, read_file, read_folder
from tests.builders.checkpoints import Bomb

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def same(weights: Weights) -> bool:
    read = weights.tensors
    return read.keys() == TENSORS.keys() and all(
        read[key].dtype == TENSORS[key].dtype and torch.equal(read[key], TENSORS[key])
        for key in TENSORS
    )


def message_of(path: Path) -> str:
    read = read_folder if path.is_dir() else read_file
    with pytest.raises(CheckpointError) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)  # torch prints in bold
    return str(raised.value).replace(f"{path.parent}{os.sep}", "")


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.bin", "w.pth", "w.pt", "w.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_what_torch_saved_is_read(tmp_path, name, zipped) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(read_file(tmp_path / name))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_mapped_where_it_can_be_and_runs_no_code(tmp_path, monkeypatch, zipped) -> None:
    """Mapped, what a trainer saved beside the weights is not read: an optimiser's is twice them."""
    given: list[dict[str, object]] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **told: given.append(told) or real(*a, **told))
    torch.save(TENSORS, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    assert same(read_file(tmp_path / "w.bin"))
    assert given == [{"map_location": "cpu", "weights_only": True, "mmap": zipped}]


def test_safetensors_are_read(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert same(read_file(tmp_path / "w.safetensors"))


def test_weights_are_found_among_a_trainers_state(tmp_path) -> None:
    torch.save({"model": TENSORS, "epoch": 3, "opt": {"lr": 0.1}}, tmp_path / "w.pth")
    assert same(read_file(tmp_path / "w.pth"))
    torch.save({"model": TENSORS, "model_ema": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    assert same(read_file(tmp_path / "w.pth", "model"))
    assert read_file(tmp_path / "w.pth", "model_ema").tensors.keys() == {"a"}


def shard(folder: Path, suffix: str, index: str) -> None:
    for number, key in enumerate(TENSORS, 1):
        path = folder / f"part-{number}{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save({key: TENSORS[key]}, path)
    weights = {key: f"part-{number}{suffix}" for number, key in enumerate(TENSORS, 1)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize(
    ("suffix", "index"),
    [(".safetensors", "model.safetensors.index.json"), (".bin", "pytorch_model.bin.index.json")],
)
def test_shards_are_put_together(tmp_path, suffix, index) -> None:
    shard(tmp_path, suffix, index)
    assert same(read_folder(tmp_path))


def test_safetensors_come_before_a_pickle(tmp_path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert same(read_folder(tmp_path))


# --- what would run code --------------------------------------------------------------------------


class Shell:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(("bomb", "named"), [(Bomb, "exec"), (Shell, "posix.system")])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path, bomb, named, zipped
) -> None:
    ran, path = tmp_path / "ran", tmp_path / "w.bin"
    torch.save({"a": torch.ones(1), "b": bomb(ran)}, path, _use_new_zipfile_serialization=zipped)
    assert message_of(path) == (
        f"w.bin is refused: it names {named}, and a pickle can execute code; "
        "convert it to safetensors where you trust it"
    )
    assert not ran.exists()


def test_the_bomb_of_these_tests_is_a_live_one(tmp_path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))  # noqa: S301  that is the test
    assert (tmp_path / "ran").exists()


def test_the_options_of_a_training_script_are_passed_over_unread(tmp_path) -> None:
    options = argparse.Namespace(lr=1, output_dir="runs", nested=argparse.Namespace(a=[1]))
    torch.save({"model": TENSORS, "args": options}, tmp_path / "w.pth")
    assert same(read_file(tmp_path / "w.pth"))
    assert "argparse.Namespace" not in str(torch.serialization.get_safe_globals())


def test_nothing_of_a_namespace_is_called_or_kept(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    options = argparse.Namespace(lr=1)
    torch.save({"model": TENSORS, "args": options}, tmp_path / "w.pth")
    monkeypatch.setattr(argparse.Namespace, "__init__", refuse)
    monkeypatch.setattr(argparse.Namespace, "__setattr__", refuse)
    assert same(read_file(tmp_path / "w.pth"))


class Hostile:
    """Pickles as a call of ``argparse.Namespace`` with an argument of its own."""

    def __init__(self, argument: Any) -> None:
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (self.argument,)


def test_a_namespace_brings_no_other_class_and_no_code(tmp_path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "w.pth"
    for inner, named in ((Bomb(ran), "exec"), (Shell(ran), "posix.system"), (Path(), "pathlib")):
        torch.save({"model": TENSORS, "args": argparse.Namespace(inner=inner)}, path)
        assert message_of(path).startswith(f"w.pth is refused: it names {named}")
    torch.save({"model": TENSORS, "args": Hostile(Bomb(ran))}, path)
    assert "it names exec, and a pickle can execute" in message_of(path)
    torch.save({"model": TENSORS, "args": Hostile("a")}, path)
    assert message_of(path).startswith("w.pth is not a whole weights file (")
    assert not ran.exists()


def test_a_namespace_is_no_weight_and_no_state_dict(tmp_path) -> None:
    path = tmp_path / "w.pth"
    torch.save({**TENSORS, "args": argparse.Namespace(lr=1)}, path)
    assert message_of(path).startswith("w.pth holds 'args', which is no weight; expected")
    torch.save(argparse.Namespace(**TENSORS), path)
    assert message_of(path) == "w.pth holds no weights by name; expected a state dict"
    torch.save({"model": argparse.Namespace(**TENSORS)}, path)
    assert message_of(path).startswith("w.pth holds 'model', which is no weight; expected")


def test_any_other_class_beside_the_weights_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": TENSORS, "args": argparse.Namespace(), "other": Decimal(3)}, path)
    assert "w.pth is refused: it names decimal.Decimal, and a pickle can" in message_of(path)


# --- what cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world" * 9, b"PK\x03\x04" * 9, b"{}"])
def test_a_file_that_is_none_is_named(tmp_path, suffix, content) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    kind = "safetensors" if suffix == ".safetensors" else "weights"
    assert message_of(path).startswith(f"w{suffix} is not a whole {kind} file (")


def test_truncated_safetensors_say_to_download_again(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-3])
    message = message_of(path)
    assert message.startswith("w.safetensors is not a whole safetensors file (")
    assert message.endswith("); download it again")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_damage_anywhere_raises_nothing_else(tmp_path, zipped) -> None:
    path = tmp_path / "w.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    whole, draw = path.read_bytes(), random.Random(0)  # noqa: S311  reproducible, not secret
    refused = 0
    for _ in range(300):
        damaged = bytearray(
            whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole
        )
        for _ in range(draw.randrange(3)):
            damaged[draw.randrange(min(len(damaged), 600))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_file(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([torch.ones(1)], "holds no weights by name; expected a state dict"),
        ({}, "holds no weights by name; expected a state dict"),
        (torch.ones(1), "holds no weights by name; expected a state dict"),
        (
            {"a": torch.ones(1), "epoch": 3},
            "holds 'epoch', which is no weight; expected a state dict, or one under "
            "target_encoder, teacher, state_dict, model_state_dict, model, module, encoder, "
            "student, model_ema, state_dict_ema",
        ),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, saved, message) -> None:
    torch.save(saved, tmp_path / "w.bin")
    assert message_of(tmp_path / "w.bin") == f"w.bin {message}"


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path) -> None:
    (tmp_path / "f").mkdir()
    assert message_of(tmp_path / "f") == (
        "f holds no weights; expected one of model.safetensors, pytorch_model.bin, "
        "model.safetensors.index.json, pytorch_model.bin.index.json"
    )


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("../secret.safetensors", "points outside its folder: '../secret.safetensors'; refused"),
        ("/etc/secret.safetensors", "points outside its folder: '/etc/secret.safetensors'"),
        ("deeper/w.safetensors", "points outside its folder: 'deeper/w.safetensors'; refused"),
        ("..", "points outside its folder: '..'; refused"),
        ("", "points outside its folder: ''; refused"),
        ("none.safetensors", "f/none.safetensors, a shard of the weights, is missing"),
        ("no\0ne", "a shard of the weights, is missing"),
    ],
)
def test_an_index_stays_in_its_folder(tmp_path, shards, message) -> None:
    folder = tmp_path / "f"
    (folder / "deeper").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "deeper" / "w.safetensors"):
        save_file(TENSORS, path)
    index = {"weight_map": {"a": shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in message_of(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_that_lists_nothing_is_named(tmp_path, index) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert message_of(tmp_path / "f") == "f/pytorch_model.bin.index.json has no weight_map"


def test_a_shard_that_is_no_state_dict_is_named(tmp_path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    torch.save({"epoch": 3}, folder / "x.bin")
    index = {"weight_map": {"a": "x.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert message_of(folder) == "f/x.bin, a shard of the weights, is no state dict"


def test_one_weight_in_two_shards_is_refused(tmp_path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, folder / name)
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message_of(folder) == "f: weight 'a' is in two shards"


# --- what is not what it looks like ---------------------------------------------------------------


def test_a_file_that_was_packed_again_is_refused_not_misread(tmp_path) -> None:
    # mapped, the compressed bytes would pass for the weights: other numbers, and no error
    path, again = tmp_path / "w.pth.tar", tmp_path / "again.pth.tar"
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert message_of(again) == (
        "again.pth.tar: 'w.pth/data.pkl' in it is compressed, so it was packed again after "
        "torch.save; unpack it and pack it without compression (zip -0), or save it again"
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_views_that_repeat_a_few_numbers_are_refused_before_they_fill_the_memory(
    tmp_path, zipped
) -> None:
    path = tmp_path / "w.bin"
    wide = {"a": torch.ones(1).expand(2**20, 2**20)}
    torch.save(wide, path, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    assert message_of(path) == (
        f"w.bin has {size} bytes and weights of {2**42}, which repeat what is in it; refused, save "
        "it again with contiguous weights"
    )


def test_many_weights_on_one_storage_are_as_little_believed(tmp_path) -> None:
    one = torch.ones(2**18)
    torch.save({f"w{i}": one for i in range(8)}, tmp_path / "w.bin")
    assert "and weights of 8388608, which repeat what is in it" in message_of(tmp_path / "w.bin")


def test_two_weights_may_share_their_numbers(tmp_path) -> None:
    one = torch.ones(2**18)
    torch.save({"a": one, "b": one}, tmp_path / "w.bin")
    assert set(read_file(tmp_path / "w.bin").tensors) == {"a", "b"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_no_weight(tmp_path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"cls_token": nested}, tmp_path / "w.bin")
    assert "w.bin holds 'cls_token', which is no weight" in message_of(tmp_path / "w.bin")
