"""One name for each weight, whatever the file calls it.

Published ViT-MSN files say ``vit.encoder.layer.N.attention.attention.query`` (transformers < 5),
``vit.layers.N.attention.q_proj`` (transformers 5), a mixture of both within one file
(``save_pretrained`` of a classifier), or ``module.blocks.N.attn.qkv`` (facebookresearch/msn);
the reference's own ``state_dict`` is read too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from msn_export.errors import CheckpointError

_PREFIX = re.compile(r"(?:module\.)?(?:vit\.)?")
_BLOCK = re.compile(r"(?:encoder\.layer|layers|blocks)\.(\d{1,4})\.(.+)")

_PARAMETERS = {
    "cls_token": "cls_token",
    "embeddings.cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "embeddings.position_embeddings": "pos_embed",
}
_OUTSIDE = {
    "patch": "patch",
    "patch_embed.proj": "patch",
    "embeddings.patch_embeddings.projection": "patch",
    "norm": "norm",
    "layernorm": "norm",
    "classifier": "classifier",
}
_INSIDE = {
    "norm1": "norm1",
    "layernorm_before": "norm1",
    "norm2": "norm2",
    "layernorm_after": "norm2",
    "attn.qkv": "attn.qkv",
    "attention.attention.query": "attn.q",
    "attention.q_proj": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.k_proj": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.v_proj": "attn.v",
    "attn.proj": "attn.proj",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "output.dense": "mlp.fc2",
}
# What pre-training leaves in a file and inference does not read.
_PROJECTION_HEAD = re.compile(r"(?:fc|pred)\.")  # facebookresearch/msn src/msn_train.py, init_model
_MASK_TOKEN = "embeddings.mask_token"  # noqa: S105  transformers, use_mask_token=True


@dataclass(frozen=True, slots=True)
class Keys:
    """A file's keys, sorted: our name to the file's, what inference does not read, the unknown."""

    known: dict[str, str]
    unread: tuple[str, ...]
    unknown: tuple[str, ...]


def canonical(key: str) -> str | None:
    """Give our name of a weight; None for a key no ViT-MSN has."""
    key = _bare(key)
    if key in _PARAMETERS:
        return _PARAMETERS[key]
    stem, _, leaf = key.rpartition(".")
    if leaf not in {"weight", "bias"}:
        return None
    match = _BLOCK.fullmatch(stem)
    if match is not None:
        inside = _INSIDE.get(match[2])
        return None if inside is None else f"blocks.{int(match[1])}.{inside}.{leaf}"
    outside = _OUTSIDE.get(stem)
    return None if outside is None else f"{outside}.{leaf}"


def rename(keys: Iterable[str], where: str) -> Keys:
    """Sort a file's keys; ``where`` is what to call the file in errors.

    Raises:
        CheckpointError: two keys are the same weight.
    """
    known: dict[str, str] = {}
    unread, unknown = [], []
    for key in keys:
        name = canonical(key)
        if _PROJECTION_HEAD.match(_bare(key)) or _bare(key) == _MASK_TOKEN:
            unread.append(key)
        elif name is None:
            unknown.append(key)
        elif name in known:
            raise CheckpointError(f"{where}: keys {known[name]!r} and {key!r} are the same weight")
        else:
            known[name] = key
    return Keys(known, tuple(unread), tuple(unknown))


def _bare(key: str) -> str:
    match = _PREFIX.match(key)
    return key if match is None else key[match.end() :]
