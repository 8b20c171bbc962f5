"""One name for each weight, whatever the file calls it.

Published ViT-MSN files say ``vit.encoder.layer.N.attention.attention.query`` (transformers < 5),
``vit.layers.N.attention.q_proj`` (transformers 5), a mixture of both within one file
(``save_pretrained`` of a classifier), or ``module.blocks.N.attn.qkv`` (facebookresearch/msn);
the reference's own ``state_dict`` is read too.
"""

import re
from collections.abc import Iterable

from msn_export.errors import CheckpointError

_BLOCK = re.compile(r"(?:encoder\.layer|layers|blocks)\.(\d{1,4})\.(.+)")

_OUTSIDE = {
    "cls_token": "cls_token",
    "embeddings.cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "embeddings.position_embeddings": "pos_embed",
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


def canonical(key: str) -> str | None:
    """Give our name of a weight; None for a key no ViT-MSN has."""
    key = re.sub(r"^(?:module\.)?(?:vit\.)?", "", key)
    if key in _OUTSIDE and key.endswith(("cls_token", "pos_embed", "position_embeddings")):
        return _OUTSIDE[key]
    stem, _, leaf = key.rpartition(".")
    if leaf not in {"weight", "bias"}:
        return None
    match = _BLOCK.fullmatch(stem)
    if match is not None:
        inside = _INSIDE.get(match[2])
        return None if inside is None else f"blocks.{int(match[1])}.{inside}.{leaf}"
    outside = _OUTSIDE.get(stem)
    return None if outside is None else f"{outside}.{leaf}"


def rename(keys: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Sort a file's keys.

    Returns:
        Our name to the file's key; the keys that are left unread (a pre-training head, a mask
        token); the keys that are unknown.

    Raises:
        CheckpointError: two keys are the same weight.
    """
    known: dict[str, str] = {}
    unread, unknown = [], []
    for key in keys:
        bare = re.sub(r"^(?:module\.)?(?:vit\.)?", "", key)
        name = canonical(key)
        if _PROJECTION_HEAD.match(bare) or bare == _MASK_TOKEN:
            unread.append(key)
        elif name is None:
            unknown.append(key)
        elif name in known:
            raise CheckpointError(f"keys {known[name]!r} and {key!r} are the same weight")
        else:
            known[name] = key
    return known, unread, unknown
