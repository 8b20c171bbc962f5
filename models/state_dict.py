"""Every writer's names for the weights, and what training wrote around them, brought to ours."""

import itertools
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.config import FAMILIES, VIT_MSN, Family, Pooling

_PREFIXES = tuple({family.prefix for family in FAMILIES})
_BLOCK = re.compile(
    r"(?:encoder\.layer\.|encoder\.layers\.encoder_layer_|layers\.|blocks\.)(\d{1,4})\.(.+)"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How some writers name weights: their module's name to ours, outside blocks and inside one.

    ``block`` is what a block's keys begin with, ``N`` its number.
    """

    writers: str
    block: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]


_TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch",
    "layernorm": "norm",
    "classifier": "classifier",
}
# transformers' save_pretrained of a classifier mixes the first two within one file, and may write
# "vit." before either; our own state_dict is the third with "patch" and "classifier".
LAYOUTS = (
    Layout(
        "transformers before 5",
        "encoder.layer.N.",
        _TRANSFORMERS,
        {
            "layernorm_before": "norm1",
            "attention.attention.query": "attn.q",
            "attention.attention.key": "attn.k",
            "attention.attention.value": "attn.v",
            "attention.output.dense": "attn.proj",
            "layernorm_after": "norm2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
    ),
    Layout(
        "transformers 5",
        "layers.N.",
        _TRANSFORMERS,
        {
            "layernorm_before": "norm1",
            "attention.q_proj": "attn.q",
            "attention.k_proj": "attn.k",
            "attention.v_proj": "attn.v",
            "attention.o_proj": "attn.proj",
            "layernorm_after": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    Layout(
        "facebookresearch/msn, the MAE code base, timm, msn-export",
        "blocks.N.",
        {
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "patch_embed.proj": "patch",
            "patch": "patch",
            "norm": "norm",
            "fc_norm": "fc_norm",
            "head": "classifier",
            "classifier.norm": "classifier.norm",
            "classifier.linear": "classifier.linear",
        },
        {
            "norm1": "norm1",
            "attn.qkv": "attn.qkv",
            "attn.proj": "attn.proj",
            "norm2": "norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    Layout(
        "torchvision",
        "encoder.layers.encoder_layer_N.",
        {
            "class_token": "cls_token",
            "encoder.pos_embedding": "pos_embed",
            "conv_proj": "patch",
            "encoder.ln": "norm",
            "heads.head": "classifier",
        },
        {
            "ln_1": "norm1",
            "self_attention.in_proj": "attn.qkv",
            "self_attention.out_proj": "attn.proj",
            "ln_2": "norm2",
            "mlp.0": "mlp.fc1",
            "mlp.3": "mlp.fc2",
            "mlp.linear_1": "mlp.fc1",
            "mlp.linear_2": "mlp.fc2",
        },
    ),
)


@dataclass(frozen=True, slots=True)
class Classifier:
    """The modules a classifier is told by, what it reads (``READS``), and who writes it."""

    modules: tuple[str, ...]
    pooling: Pooling
    writers: str


CLASSIFIERS = (
    Classifier(("classifier",), "cls", "transformers, msn-export"),
    Classifier(("head",), "cls", "the MAE code base with --cls_token, DeiT, timm"),
    Classifier(("heads.head",), "cls", "torchvision"),
    Classifier(
        ("fc_norm", "head"), "patches", "the MAE code base with --global_pool, timm's average pool"
    ),
    Classifier(
        ("classifier.norm", "classifier.linear"),
        "blocks",
        "facebookresearch/msn linear_eval.py (a state dict classifier beside target_encoder)",
    ),
)
_PARAMETERS = {"cls_token", "pos_embed"}
_OUTSIDE = {theirs: ours for layout in LAYOUTS for theirs, ours in layout.outside.items()}
_INSIDE = {theirs: ours for layout in LAYOUTS for theirs, ours in layout.inside.items()}


@dataclass(frozen=True, slots=True)
class Foreign:
    """Keys that are no weight of a ViT-MSN: ``pattern`` finds them, ``what`` is what they are."""

    pattern: re.Pattern[str]
    what: str
    example: str


# Left unread with a note in every family. "vit." is taken off before.
SPARE = (
    Foreign(
        # facebookresearch/msn src/msn_train.py, init_model
        re.compile(r"(?:fc|pred)\.|(?:embeddings\.)?mask_token"),
        "of pre-training",
        "fc.fc1.weight, pred.fc1.weight, embeddings.mask_token",
    ),
    Foreign(
        re.compile(r"(?:embeddings\.)?position_ids"),
        "that transformers ignores with a warning",
        "embeddings.position_ids",
    ),
)
# lightly's masked ViT holds a ViT whose head it never applies: left unread beside its mask token
_UNUSED_HEAD = re.compile(r"vit\.(?:heads\.head|head)\.")
_MASK_TOKEN = "mask_token"  # noqa: S105

# Refused by what they are, wherever they stand in a key.
REFUSED = (
    Foreign(
        re.compile(r"\.(?:lora_\w+|ia3_l|base_layer|original_module|modules_to_save|hada_w1_a)\."),
        "holds a PEFT adapter that is not merged; call merge_and_unload() on the PEFT model, then "
        "save_pretrained() on what it returns",
        "….query.lora_A.default.weight, ….query.base_layer.weight",
    ),
    Foreign(
        re.compile(
            r"\.(?:SCB|weight_format|qweight|qzeros|g_idx|scales|weight_scale\w*|input_scale|"
            r"weight_packed|weight_zero_point|_packed_params\S*)$|"
            r"\.weight\.(?:absmax|quant_map|nested_\w+|quant_state\S*|_data|_scale)$"
        ),
        "is quantised; give the checkpoint it was made from, and quantise the exported graph with "
        "msn-export calibrate",
        "….weight.absmax, ….SCB, ….qweight, ….weight_scale",
    ),
)


@dataclass(frozen=True, slots=True)
class Keys:
    """A file's keys, sorted: our name to the file's, those left unread by reason, the unknown."""

    known: dict[str, str]
    unread: dict[str, tuple[str, ...]]
    unknown: tuple[str, ...]


def canonical(key: str) -> str | None:
    """Give our name of a weight; None for a key no ViT-MSN has."""
    key = bare(key).replace("self_attention.in_proj_", "self_attention.in_proj.")
    if _OUTSIDE.get(key) in _PARAMETERS:
        return _OUTSIDE[key]
    input_format, _, leaf = key.rpartition(".")
    if leaf not in {"weight", "bias"}:
        return None
    match = _BLOCK.fullmatch(input_format)
    if match is not None:
        inside = _INSIDE.get(match[2])
        return None if inside is None else f"blocks.{int(match[1])}.{inside}.{leaf}"
    outside = _OUTSIDE.get(input_format)
    return None if outside is None or outside in _PARAMETERS else f"{outside}.{leaf}"


def rename(keys: Iterable[str], where: str, family: Family = VIT_MSN) -> Keys:
    """Sort a file's keys; ``where`` is what to call the file in errors."""
    keys = tuple(keys)
    known: dict[str, str] = {}
    unread: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        name, spare = canonical(key), _spare(key, keys, family)
        if spare is not None:
            unread.setdefault(spare, []).append(key)
        elif name is None:
            _require_plain(key, where)
            unknown.append(key)
        elif name in known:
            raise CheckpointError(f"{where}: keys {known[name]!r} and {key!r} are the same weight")
        else:
            known[name] = key
    return Keys(known, {why: tuple(found) for why, found in unread.items()}, tuple(unknown))


def bare(key: str) -> str:
    """Take off what transformers writes before an encoder's keys in a classifier."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


def is_weight(key: str) -> bool:
    """Whether a key belongs to a ViT-MSN, be it one that inference does not read."""
    return canonical(key) is not None or any(_spare(key, (), family) for family in FAMILIES)


def _spare(key: str, keys: tuple[str, ...], family: Family) -> str | None:
    if _UNUSED_HEAD.match(key) and _MASK_TOKEN in keys:
        return "of a head that lightly's masked ViT does not apply"
    key = bare(key)
    ignored = (what for prefix, what in family.ignored.items() if key.startswith(prefix))
    spare = (spare.what for spare in SPARE if spare.pattern.match(key))
    return next(itertools.chain(ignored, spare), None)


def _require_plain(key: str, where: str) -> None:
    for foreign in REFUSED:
        if foreign.pattern.search(key):
            shown = key if key.isprintable() else ascii(key)
            raise CheckpointError(f"{where} {foreign.what} (key {shown})")


# Where a file keeps weights beside an optimiser's state, best first, and who writes it so.
CONTAINERS = {
    "target_encoder": "facebookresearch/msn: the averaged encoder, which its evaluation reads",
    "teacher": "self-distillation: the averaged network",
    "state_dict": "PyTorch Lightning, timm's training script",
    "model_state_dict": "PyTorch's tutorials",
    "model": "the MAE and DeiT code bases",
    "module": "DeepSpeed (mp_rank_00_model_states.pt)",
    "encoder": "facebookresearch/msn: the encoder that gradients train",
    "student": "self-distillation: the network that gradients train",
    "model_ema": "DeiT: an exponential moving average",
    "state_dict_ema": "timm's training script: an exponential moving average",
}
# What a wrapping module puts before every key, best first, and which it is.
PREFIXES = {
    "module": "DataParallel, DistributedDataParallel, AveragedModel, facebookresearch/msn",
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "base_model": "PEFT after merging",
    "model": "a LightningModule with a field model",
    "target_encoder": "a training script of MSN",
    "teacher": "self-distillation: the averaged network",
    "backbone": "lightly: the averaged encoder",
    "student": "self-distillation: the network that gradients train",
    "anchor_backbone": "lightly: the encoder that gradients train",
}
# What stands within keys where a part of the model was wrapped.
INSIDE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# The head of facebookresearch/mae main_linprobe.py: BatchNorm without weights, then a linear layer.
PROBE = {"head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias"}
_PROBE_EPS = 1e-6  # main_linprobe.py, BatchNorm1d(affine=False, eps=1e-6)
_DEEPEST = 8  # containers within one another; the deepest known are DeepSpeed's within Lightning's
_RANK = {name: rank for rank, name in enumerate((*PREFIXES, *INSIDE))}
_LINEAR_EVAL = ("target_encoder", "encoder")  # beside which facebookresearch/msn has a classifier

Prefix = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights without wrappers, and what a user should know of the choice."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def unwrap(loaded: Any, where: str, choice: str | None = None) -> Weights:
    """Take containers and prefixes off what a file holds.

    Args:
        loaded: what torch or safetensors read.
        where: what to call the file in errors.
        choice: the container or prefix to take where there are several.
    """
    taken: list[str] = []
    beside: list[str] = []
    parent: Any = None
    held = loaded
    chosen = choice is None
    for _ in range(_DEEPEST):
        if not isinstance(held, Mapping):
            break
        names = [name for name in CONTAINERS if _holds(held.get(name))]
        if not chosen and _holds(held.get(choice)):
            name, chosen = str(choice), True
        elif names:
            name = names[0]
        else:
            break
        beside += [other for other in (*names, *_unlisted(held)) if other != name]
        taken.append(name)
        parent, held = held, held[name]
    state = _state_dict(held, where)
    wanted = None if chosen else (str(choice), [*taken, *beside])
    tensors, prefix, others, outside = _without_prefix(state, where, wanted)
    if taken and taken[-1] in _LINEAR_EVAL and _holds(parent.get("classifier")):
        head = _state_dict(parent["classifier"], where)
        tensors |= {f"classifier.{_split(key)[1]}": tensor for key, tensor in head.items()}
    steps = [*(f"{name!r}" for name in taken), *(f"'{name}.'" for name in prefix)]
    beside += [".".join(other) for other in others]
    notes = []
    if steps or beside:
        also = ""
        if beside:
            listed = ", ".join(map(repr, beside))
            also = f"; the file also has {listed} (--weights {beside[0].rpartition('.')[2]})"
        source = " > ".join(steps) if steps else "the keys without a prefix"
        notes.append(f"weights read from {source}{also}")
    if outside:
        notes.append(_left(outside, prefix))
    if _is_probe(tensors):
        _fold(tensors)
        notes.append("the BatchNorm of MAE's linear probe is folded into its classifier")
    return Weights(tensors, tuple(notes))


def _unlisted(held: Mapping[Any, Any]) -> list[str]:
    """Name the dictionaries of no row of CONTAINERS that hold a model."""
    return [
        name
        for name, value in held.items()
        if name not in CONTAINERS and _holds(value) and any(map(_ends_in_cls, value))
    ]


def _ends_in_cls(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(("cls_token", "class_token"))


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _state_dict(held: Any, where: str) -> dict[str, Tensor]:
    if not _holds(held):
        raise CheckpointError(f"{where} holds no weights by name; expected a state dict")
    odd = [key for key, value in held.items() if not isinstance(value, Tensor) or value.is_nested]
    if odd:
        inner = [key for key in odd if _holds(held[key])]
        hint = f" (--weights KEY takes one of {', '.join(map(repr, inner[:5]))})" if inner else ""
        raise CheckpointError(
            f"{where} holds {odd[0]!r}, which is no weight; expected a state dict, or one under "
            f"{', '.join(CONTAINERS)}{hint}"
        )
    return {str(key): tensor for key, tensor in held.items()}


def _without_prefix(
    state: dict[str, Tensor], where: str, choice: tuple[str, list[str]] | None
) -> tuple[dict[str, Tensor], Prefix, list[Prefix], list[str]]:
    """Take the prefix off the keys of one model.

    Args:
        state: a flat state dict.
        where: what to call the file in errors.
        choice: the prefix to take, and the file's containers, for the error.

    Returns:
        Its weights, the prefix, the prefixes of other whole models, and the keys left outside.
    """
    groups: dict[Prefix, dict[str, str]] = {}
    fields = _fields(state)
    for key in state:
        prefix, rest = _split(key, fields)
        group = groups.setdefault(prefix, {})
        if rest in group:
            raise CheckpointError(f"{where}: keys {group[rest]!r} and {key!r} are the same weight")
        group[rest] = key
    sizes = {prefix: sum(_of_encoder(rest) for rest in group) for prefix, group in groups.items()}
    whole = [prefix for prefix, size in sizes.items() if 2 * size > max(sizes.values())]
    whole.sort(key=lambda prefix: [_RANK.get(name, len(_RANK)) for name in prefix])
    if choice is not None:
        asked = [prefix for prefix in whole if choice[0] in prefix]
        if not asked:
            names = [*choice[1], *(name for prefix in whole for name in prefix)]
            has = f"it has {', '.join(dict.fromkeys(names))}" if names else "it has one model alone"
            raise CheckpointError(f"{where} has no weights under {choice[0]!r} (--weights); {has}")
    else:
        asked = whole
    if not asked:  # nothing here is of a ViT-MSN: whoever assembles it says so
        return state, (), [], []
    chosen = asked[0]
    if len(asked) > 1 and not fields.isdisjoint(chosen):
        listed = ", ".join(repr(".".join(prefix)) for prefix in asked)
        raise CheckpointError(
            f"{where} holds several models, under {listed}; choose one with --weights "
            f"{next(name for name in chosen if name in fields)}"
        )
    others = [prefix for prefix in whole if prefix != chosen]
    tensors = {rest: state[key] for rest, key in groups[chosen].items()}
    left = [
        key
        for prefix, group in groups.items()
        if prefix != chosen and prefix not in others
        for key in group.values()
    ]
    if not chosen:  # nothing wraps the model, so every key has to be one of its own
        return tensors | {key: state[key] for key in left}, chosen, others, []
    return tensors, chosen, others, left


def _is_probe(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all of a linear probe is there, in its shapes; else its keys are unknown ones."""
    if not tensors.keys() >= PROBE:
        return False
    parts = [tensors[name] for name in PROBE]
    plain = all(t.layout is torch.strided and t.device.type == "cpu" for t in parts)
    rows = tuple(tensors["head.1.weight"].shape)
    if not plain or len(rows) != 2 or not all(t.is_floating_point() for t in parts):
        return False
    sizes = {"head.1.weight": rows, "head.1.bias": rows[:1]}
    return all(tuple(tensors[name].shape) == sizes.get(name, rows[1:]) for name in PROBE)


def _fold(tensors: dict[str, Tensor]) -> None:
    """Write MAE's linear probe as one linear layer ``head``, in place; exact in real arithmetic.

    ``W ((x - mean) / std) + b`` is ``W' x + b'`` with ``W' = W / std`` and ``b' = b - W' mean``.
    """
    parts = {name: tensors.pop(name).double() for name in PROBE}
    tensors.pop("head.0.num_batches_tracked", None)
    weight = parts["head.1.weight"] / (parts["head.0.running_var"] + _PROBE_EPS).sqrt()
    bias = parts["head.1.bias"] - weight @ parts["head.0.running_mean"]
    tensors["head.weight"], tensors["head.bias"] = weight.float(), bias.float()


def _of_encoder(key: str) -> bool:
    name = canonical(key)
    return name is not None and not name.startswith("classifier.")


def _fields(state: Iterable[str]) -> set[str]:
    """Find the names, of no row of PREFIXES, that stand before the [CLS] token of a model."""
    found: set[str] = set()
    for key in filter(_ends_in_cls, state):
        parts = key.split(".")
        tails = (canonical(_joined(parts[first:])) for first in range(len(parts)))
        found.update(parts[: next((i for i, tail in enumerate(tails) if tail is not None), 0)])
    return found - _RANK.keys()


def _split(key: str, fields: Container[str] = ()) -> tuple[Prefix, str]:
    """Part a key into the wrappers before it and the rest, without those within it."""
    parts = key.split(".")
    first = 0
    while first < len(parts) - 1 and (parts[first] in PREFIXES or parts[first] in fields):
        if parts[first] not in INSIDE and is_weight(_joined(parts[first:])):
            break
        first += 1
    return tuple(parts[:first]), _joined(parts[first:])


def _joined(parts: Iterable[str]) -> str:
    return ".".join(part for part in parts if part not in INSIDE)


def _left(keys: list[str], prefix: Prefix) -> str:
    listed = ", ".join(key if key.isprintable() else ascii(key) for key in keys[:5])
    more = ", …" if len(keys) > 5 else ""
    count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    note = f"not read: {count} outside '{'.'.join(prefix)}.' ({listed}{more})"
    heads = [key for key in keys if (canonical(_split(key)[1]) or "").startswith("classifier.")]
    if heads:
        note += f"; what {heads[0]} reads is not known, so it is no classifier of this model"
    return note
