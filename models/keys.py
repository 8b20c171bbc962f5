"""One name for each weight, whatever the file calls it; and the keys that are no weight of ours."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from msn_export.errors import CheckpointError
from msn_export.models.variants import Pooling

_PREFIX = re.compile(r"(?:vit\.)?")
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


# Left unread with a note. "vit." is taken off before.
SPARE = (
    Foreign(
        # facebookresearch/msn src/msn_train.py, init_model
        re.compile(r"(?:fc|pred)\.|(?:embeddings\.)?mask_token"),
        "of pre-training",
        "fc.fc1.weight, pred.fc1.weight, embeddings.mask_token",
    ),
    Foreign(
        re.compile(r"pooler\.|(?:embeddings\.)?position_ids"),
        "that transformers ignores with a warning",
        "pooler.dense.weight, embeddings.position_ids",
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
    stem, _, leaf = key.rpartition(".")
    if leaf not in {"weight", "bias"}:
        return None
    match = _BLOCK.fullmatch(stem)
    if match is not None:
        inside = _INSIDE.get(match[2])
        return None if inside is None else f"blocks.{int(match[1])}.{inside}.{leaf}"
    outside = _OUTSIDE.get(stem)
    return None if outside is None or outside in _PARAMETERS else f"{outside}.{leaf}"


def rename(keys: Iterable[str], where: str) -> Keys:
    """Sort a file's keys; ``where`` is what to call the file in errors.

    Raises:
        CheckpointError: two keys are the same weight, or the file is an adapter or quantised.
    """
    keys = tuple(keys)
    known: dict[str, str] = {}
    unread: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        name, spare = canonical(key), _spare(key, keys)
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
    match = _PREFIX.match(key)
    return key if match is None else key[match.end() :]


def is_weight(key: str) -> bool:
    """Whether a key belongs to a ViT-MSN, be it one that inference does not read."""
    return canonical(key) is not None or any(f.pattern.match(bare(key)) for f in SPARE)


def _spare(key: str, keys: tuple[str, ...]) -> str | None:
    if _UNUSED_HEAD.match(key) and _MASK_TOKEN in keys:
        return "of a head that lightly's masked ViT does not apply"
    return next((spare.what for spare in SPARE if spare.pattern.match(bare(key))), None)


def _require_plain(key: str, where: str) -> None:
    for foreign in REFUSED:
        if foreign.pattern.search(key):
            shown = key if key.isprintable() else ascii(key)
            raise CheckpointError(f"{where} {foreign.what} (key {shown})")
