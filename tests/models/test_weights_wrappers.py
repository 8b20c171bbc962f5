"""Wrappers around a model are taken off, each choice is noted, and --weights makes it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import CheckpointError
from msn_export.models.state_dict import rename
from msn_export.models.weights import CONTAINERS, INSIDE, PREFIXES, unwrap
from tests.builders.writers import (
    encoder,
    head,
    linear_probe,
    prefixed,
    probe,
    torchvision,
    transformers_5,
)

MODEL = encoder()
OTHER = encoder(seed=7)


def holds(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == wanted.keys() and all(
        torch.equal(tensors[key], wanted[key]) for key in wanted
    )


def message_of(loaded: Any, choice: str | None = None) -> str:
    with pytest.raises(CheckpointError) as raised:
        unwrap(loaded, "f", choice)
    return str(raised.value)


def test_a_plain_state_dict_needs_no_note() -> None:
    found = unwrap(MODEL, "f")
    assert holds(found.tensors, MODEL)
    assert found.notes == ()


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_opened_and_noted(container) -> None:
    found = unwrap({"epoch": 3, container: MODEL}, "f")
    assert holds(found.tensors, MODEL)
    assert found.notes == (f"weights read from {container!r}",)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_is_taken_off_and_noted(prefix) -> None:
    found = unwrap(prefixed(f"{prefix}.", MODEL), "f")
    assert holds(found.tensors, MODEL)
    assert found.notes == (f"weights read from '{prefix}.'",)


@pytest.mark.parametrize("state", [encoder(), transformers_5(encoder()), torchvision(encoder())])
@pytest.mark.parametrize("field", ["encoder", "module.vit_model", "net.0", "layers", "blocks"])
def test_a_field_of_any_name_that_holds_the_model_is_taken_off_and_noted(field, state) -> None:
    found = unwrap(prefixed(f"{field}.", state) | {"fc.weight": torch.zeros(1)}, "f")
    assert holds(found.tensors, state)
    steps = " > ".join(f"'{name}.'" for name in field.split("."))
    assert found.notes == (
        f"weights read from {steps}",
        f"not read: 1 key outside '{field}.' (fc.weight)",
    )


@pytest.mark.parametrize("inner", INSIDE)
def test_wrapped_parts_of_a_model_have_their_plain_names(inner) -> None:
    keys = {key.replace("blocks.1.attn", f"blocks.1.{inner}.attn"): t for key, t in MODEL.items()}
    assert holds(unwrap(keys, "f").tensors, MODEL)


@given(
    st.lists(st.sampled_from(sorted(CONTAINERS)), max_size=4),
    st.lists(st.sampled_from(sorted(PREFIXES)), max_size=4),
)
def test_wrappers_are_taken_off_however_they_are_nested(containers, prefixes) -> None:
    held: Any = prefixed("".join(f"{name}." for name in prefixes), MODEL)
    for name in reversed(containers):
        held = {name: held, "epoch": 3}
    found = unwrap(held, "f")
    assert holds(found.tensors, MODEL)
    steps = [*map(repr, containers), *(f"'{name}.'" for name in prefixes)]
    assert found.notes == ((f"weights read from {' > '.join(steps)}",) if steps else ())


def test_containers_within_one_another_without_end_are_not_followed() -> None:
    held: Any = MODEL
    for _ in range(50):
        held = {"model": held}
    assert message_of(held).startswith("f holds 'model', which is no weight")


# --- several weights in one file ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("target_encoder", "encoder"),
        ("teacher", "student"),
    ],
)
def test_of_two_state_dicts_one_is_taken_with_a_note_and_the_other_can_be(first, second) -> None:
    file = {second: OTHER, first: MODEL}
    found = unwrap(file, "f")
    assert holds(found.tensors, MODEL)
    assert found.notes == (
        f"weights read from {first!r}; the file also has {second!r} (--weights {second})",
    )
    other = unwrap(file, "f", second)
    assert holds(other.tensors, OTHER)
    assert other.notes == (
        f"weights read from {second!r}; the file also has {first!r} (--weights {first})",
    )


@pytest.mark.parametrize(
    ("first", "second"), [("teacher", "student"), ("backbone", "anchor_backbone")]
)
def test_of_two_prefixes_one_is_taken_with_a_note_and_the_other_can_be(first, second) -> None:
    file = {"state_dict": prefixed(f"{second}.", OTHER) | prefixed(f"{first}.", MODEL)}
    found = unwrap(file, "f")
    assert holds(found.tensors, MODEL)
    assert found.notes == (
        f"weights read from 'state_dict' > '{first}.'; the file also has {second!r} "
        f"(--weights {second})",
    )
    assert holds(unwrap(file, "f", second).tensors, OTHER)
    assert holds(unwrap(file, "f", "state_dict").tensors, MODEL)


def test_a_container_that_no_table_names_is_noted_and_can_be_chosen() -> None:
    file = {"mine": OTHER, "model": MODEL, "optimizer": {"state": torch.zeros(1)}}
    assert unwrap(file, "f").notes == (
        "weights read from 'model'; the file also has 'mine' (--weights mine)",
    )
    found = unwrap(file, "f", "mine")
    assert holds(found.tensors, OTHER)
    assert "weights read from 'mine'; the file also has 'model'" in found.notes[0]


def test_of_fields_that_no_table_names_one_has_to_be_chosen() -> None:
    file = prefixed("base_encoder.", MODEL) | prefixed("momentum_encoder.", OTHER)
    assert message_of(file) == (
        "f holds several models, under 'base_encoder', 'momentum_encoder'; choose one with "
        "--weights base_encoder"
    )
    found = unwrap(file, "f", "momentum_encoder")
    assert holds(found.tensors, OTHER)
    assert found.notes == (
        "weights read from 'momentum_encoder.'; the file also has 'base_encoder' "
        "(--weights base_encoder)",
    )


def test_what_could_be_chosen_is_named_where_nothing_is_known() -> None:
    message = message_of({"epoch": 3, "mine": MODEL})
    assert message.startswith("f holds 'epoch', which is no weight; expected a state dict, or one ")
    assert message.endswith(", model_ema, state_dict_ema (--weights KEY takes one of 'mine')")


@pytest.mark.parametrize(
    ("file", "there"),
    [
        ({"model": MODEL, "model_ema": OTHER}, "it has model, model_ema"),
        (prefixed("backbone.", MODEL), "it has backbone"),
        (MODEL, "it has one model alone"),
    ],
)
def test_a_choice_that_is_not_there_lists_what_is(file, there) -> None:
    assert message_of(file, "none") == f"f has no weights under 'none' (--weights); {there}"


# --- what lies outside the model ------------------------------------------------------------------


def test_what_lies_beside_a_wrapped_model_is_named() -> None:
    beside = {f"loss.{i}.weight": torch.zeros(1) for i in range(6)} | {"n": torch.zeros(1)}
    found = unwrap(prefixed("model.", MODEL) | beside, "f")
    assert holds(found.tensors, MODEL)
    assert found.notes[1] == (
        "not read: 7 keys outside 'model.' (loss.0.weight, loss.1.weight, loss.2.weight, "
        "loss.3.weight, loss.4.weight, …)"
    )


def test_a_head_beside_a_wrapped_encoder_is_no_classifier_of_it() -> None:
    found = unwrap(prefixed("backbone.", MODEL) | head(), "f")
    assert holds(found.tensors, MODEL)
    assert found.notes[1] == (
        "not read: 2 keys outside 'backbone.' (head.weight, head.bias); what head.weight reads is "
        "not known, so it is no classifier of this model"
    )


def test_a_head_within_the_wrapped_model_is_its_classifier() -> None:
    file = prefixed("model.", prefixed("vit.", MODEL) | head())
    assert unwrap(file, "f").tensors.keys() == {*prefixed("vit.", MODEL), *head()}


def test_a_key_beside_a_plain_model_is_kept_to_be_refused() -> None:
    key = "model.layer_scale.weight"
    assert rename(unwrap({**MODEL, key: torch.zeros(1)}, "f").tensors, "f").unknown == (key,)


def test_msns_classifier_joins_the_encoder_it_reads() -> None:
    for wrap in ("", "module.", "module._orig_mod."):
        file = {
            "target_encoder": prefixed("module.", MODEL),
            "classifier": prefixed(wrap, probe(1)),
        }
        assert unwrap(file, "f").tensors.keys() == {*MODEL, *prefixed("classifier.", probe(1))}


def test_the_batch_norm_of_maes_linear_probe_is_folded_with_a_note() -> None:
    found = unwrap({"model": MODEL | linear_probe()}, "f")
    assert found.tensors.keys() == {*MODEL, "head.weight", "head.bias"}
    assert found.notes[1] == "the BatchNorm of MAE's linear probe is folded into its classifier"


@pytest.mark.parametrize("key", ["head.0.running_var", "head.1.weight", "head.1.bias"])
@pytest.mark.parametrize(
    "harm",
    [
        None,
        torch.zeros(7),
        torch.zeros(()),
        torch.zeros(3, 64, dtype=torch.int8),
        torch.zeros(3, 64, device="meta"),
        torch.zeros(3, 64).to_sparse(),
    ],
)
def test_a_linear_probe_that_is_not_whole_is_left_to_be_refused(key, harm) -> None:
    part = linear_probe() | {key: harm}
    part = {name: tensor for name, tensor in part.items() if tensor is not None}
    assert "head.0.running_mean" in rename(unwrap(MODEL | part, "f").tensors, "f").unknown


def test_one_weight_twice_is_refused_by_name() -> None:
    twice = {**MODEL, "blocks.0._orig_mod.norm1.weight": torch.zeros(1)}
    assert message_of(twice) == (
        "f: keys 'blocks.0.norm1.weight' and 'blocks.0._orig_mod.norm1.weight' are the same weight"
    )


keys = st.lists(
    st.sampled_from([*PREFIXES, *INSIDE, *MODEL, "fc", "vit", "", "\x1b", "classifier"]), max_size=5
).map(".".join)


@given(st.dictionaries(keys, st.just(torch.zeros(1)), max_size=8))
def test_whatever_keys_a_file_has_none_is_lost_without_a_word(file) -> None:
    try:
        found = unwrap(file, "f")
    except CheckpointError as error:
        known = ("are the same weight", "holds no weights by name", "holds several models")
        assert any(reason in str(error) for reason in known)
        return
    read = len(found.tensors)
    assert read == len(file) or found.notes
    assert all(note.isprintable() for note in found.notes)
