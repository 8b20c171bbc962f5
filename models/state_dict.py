"""Every writer's names for the weights, brought to ours, and the model made of them."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.config import (
    FAMILIES,
    READS,
    VARIANTS,
    VIT_MSN,
    Family,
    VitConfig,
    counted,
    named_variant,
    shown,
)
from msn_export.models.vit import VitMsn

_PREFIXES = tuple({family.prefix for family in FAMILIES})
_BLOCK = re.compile(
    r"(?:encoder\.layer\.|encoder\.layers\.encoder_layer_|layers\.|blocks\.)(\d{1,4})\.(.+)"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of weights by some writers: their module's name to ours, outside blocks and inside one.

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

    names: dict[str, str]
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
    names: dict[str, str] = {}
    unread: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        name, spare = canonical(key), _spare(key, keys, family)
        if spare is not None:
            unread.setdefault(spare, []).append(key)
        elif name is None:
            _require_plain(key, where)
            unknown.append(key)
        elif name in names:
            raise CheckpointError(f"{where}: keys {names[name]!r} and {key!r} are the same weight")
        else:
            names[name] = key
    return Keys(names, {why: tuple(found) for why, found in unread.items()}, tuple(unknown))


def bare(key: str) -> str:
    """Take off what transformers writes before an encoder's keys in a classifier."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


def is_weight(key: str) -> bool:
    """Check whether a key belongs to a ViT-MSN, be it one that inference does not read."""
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
            raise CheckpointError(f"{where} {foreign.what} (key {shown(key)})")


_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_QKV = ("attn.q.", "attn.k.", "attn.v.")


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model with its weights, their hash, and what a user should know."""

    model: VitMsn
    sha256: str
    notes: tuple[str, ...]


def assemble(
    tensors: dict[str, Tensor],
    config: VitConfig,
    where: str,
    origin: str,
    family: Family = VIT_MSN,
) -> Assembled:
    """Build the model; ``tensors`` is emptied on the way, so that weights are held once.

    ``config`` says nothing yet of what the classifier reads. ``where`` and ``origin`` name the file
    and the source of the configuration in errors.
    """
    keys = rename(tensors, where, family)
    config = with_classifier(tensors, config, where)
    with torch.device("meta"):
        model = VitMsn(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _require_keys(shapes, keys, tensors, (where, origin))
    _require_numbers(keys, tensors, where)
    notes = _notes(keys, tensors, config)
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for name in sorted(shapes):
        tensor = _take(name, keys.names, tensors)
        # NaN and infinity reach the sum, which is far cheaper than asking each number
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            found = keys.names.get(name, name)
            raise CheckpointError(f"{where}: weight {found!r} has NaN or infinity")
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data.cast("B"))
        state[name] = tensor
    model.requires_grad_(requires_grad=False)
    model.load_state_dict(state, assign=True)
    return Assembled(model.eval(), digest.hexdigest(), notes)


def _take(name: str, names: Mapping[str, str], tensors: dict[str, Tensor]) -> Tensor:
    if name in names:
        found = tensors.pop(names[name])
    else:  # a packed projection that the file has in three
        found = torch.cat([tensors.pop(names[name.replace("attn.qkv.", part)]) for part in _QKV])
    # a weight may be stored negated (torch: is_neg), which what reads its memory would not see
    return found.detach().resolve_neg().to(torch.float32).contiguous()


def _require_keys(
    shapes: Mapping[str, tuple[int, ...]],
    keys: Keys,
    tensors: Mapping[str, Tensor],
    names: tuple[str, str],
) -> None:
    where, origin = names
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ".attn.qkv." in name and name not in keys.names:
            for part in _QKV:
                wanted[name.replace("attn.qkv.", part)] = (shape[0] // 3, *shape[1:])
        else:
            wanted[name] = shape
    missing = [name for name in wanted if name not in keys.names]
    surplus = [key for name, key in keys.names.items() if name not in wanted]
    unexpected = [*keys.unknown, *surplus]
    odd = [
        f"{shown(key)} is {list(tensors[key].shape)}, expected {list(wanted[name])}"
        for name, key in keys.names.items()
        if name in wanted and tuple(tensors[key].shape) != wanted[name]
    ]
    if not (missing or unexpected or odd):
        return
    counts = (
        f"{counted(missing, 'key', 'missing')}, {counted(unexpected, 'key', 'unexpected')}, "
        f"{counted(odd, 'key', 'of another shape')}"
    )
    if odd or surplus:  # weights of a ViT-MSN, of another shape than was said
        raise CheckpointError(f"{where}: {counts}; the shape is from {origin}: is it right?")
    if missing:
        raise CheckpointError(f"{where}: {counts}; the file is not whole, or of another model")
    raise CheckpointError(
        f"{where}: {counts}; all of a ViT-MSN is there and more that it would not compute, so the "
        "file is of another model; remove the keys if you know that they are not used"
    )


def _require_numbers(keys: Keys, tensors: Mapping[str, Tensor], where: str) -> None:
    """Require dense floating-point numbers: a pickle may hold tensors that are neither."""
    for key in keys.names.values():
        tensor = tensors[key]
        dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.dtype not in _NUMBERS:
            kind = _short(tensor.dtype) if dense else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(
                f"{where}: weight {key!r} is {kind}; expected dense floating-point numbers "
                "of 16 bits or more (quantised checkpoints are not read)"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _notes(keys: Keys, tensors: Mapping[str, Tensor], config: VitConfig) -> tuple[str, ...]:
    notes = [f"not read: {counted(found, 'key', why)}" for why, found in keys.unread.items()]
    if config.labels and config.pooling == "blocks":
        notes.append(
            f"the classifier is msn's linear evaluation and reads {READS['blocks']} "
            f"({config.pooled_blocks}); norm 1 before the linear layer is assumed, as in its "
            "configuration (normalize: true), for the file does not say; its evaluation prepares "
            "images as --preprocess msn-eval does"
        )
    if config.labels and keys.names.get("classifier.weight", "").endswith("head.weight"):
        read = READS[config.pooling]
        notes.append(f"the classifier is {keys.names['classifier.weight']!r} and reads {read}")
    converted = sorted({_short(tensors[key].dtype) for key in keys.names.values()} - {"float32"})
    if converted:
        notes.append(f"weights were {', '.join(converted)}, read as float32")
    return tuple(notes)


def classes_of(tensors: Mapping[str, Tensor], where: str) -> int:
    """Count the classifier's rows; 0 without a classifier."""
    names = rename(tensors, where).names
    key = names.get("classifier.weight") or names.get("classifier.linear.weight")
    if key is None:
        return 0
    shape = tuple(tensors[key].shape)
    if len(shape) != 2 or shape[0] == 0:
        raise CheckpointError(
            f"{where}: {shown(key)} is {list(shape)}; expected [classes, hidden size]"
        )
    return shape[0]


def with_classifier(tensors: Mapping[str, Tensor], config: VitConfig, where: str) -> VitConfig:
    """Give the configuration with what the classifier among the weights reads."""
    names = rename(tensors, where).names
    probe = names.get("classifier.linear.weight")
    if probe is not None:
        width = tuple(tensors[probe].shape)[-1]
        blocks, rest = divmod(width, config.dim)
        if rest or not 1 <= blocks <= config.depth:
            raise CheckpointError(
                f"{where}: {shown(probe)} reads {width} numbers; expected a multiple of the "
                f"hidden size {config.dim}, for up to {config.depth} blocks"
            )
        return replace(config, pooling="blocks", pooled_blocks=blocks)
    if "fc_norm.weight" in names and "classifier.weight" in names:
        return replace(config, pooling="patches")
    return config


@dataclass(frozen=True, slots=True)
class Shaped:
    """The shape of weights, where it is from, and what a user should know of it."""

    config: VitConfig
    origin: str
    notes: tuple[str, ...] = ()
    family: Family = VIT_MSN


def config_of(tensors: Mapping[str, Tensor], variant: str | None, where: str) -> Shaped:
    """Infer the shape of weights that come without a config.json.

    A published shape is found by patch, width and depth; the image size is that of the position
    embedding.
    """
    names = rename(tensors, where).names
    if not names:
        keys = ", ".join(map(shown, list(tensors)[:3]))
        raise CheckpointError(f"{where} holds no weights of a ViT-MSN; its keys are such as {keys}")
    labels = tuple(f"LABEL_{i}" for i in range(classes_of(tensors, where)))
    patch, position = (
        tuple(tensors[names[name]].shape) if name in names else ()
        for name in ("patch.weight", "pos_embed")
    )
    depth = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    for name, config in VARIANTS.items():
        shape = (config.dim, config.channels, *config.patch_size)
        size = _image_size(position, config)
        if variant in {None, name} and (patch, depth) == (shape, config.depth) and size:
            notes: tuple[str, ...] = ()
            if size != config.image_size:
                notes = (f"image size {size[0]}x{size[1]}, as the position embedding is for",)
            origin = "the patch, width and depth of " if variant is None else "--variant "
            return Shaped(replace(config, labels=labels, image_size=size), origin + name, notes)
    if variant is not None:
        return Shaped(replace(named_variant(variant), labels=labels), f"--variant {variant}")
    raise CheckpointError(
        f"{where} fits no published shape; put its config.json beside it, or name one with "
        f"--variant ({', '.join(VARIANTS)})"
    )


def _image_size(position: tuple[int, ...], config: VitConfig) -> tuple[int, int] | None:
    """Read the image size off position embeddings [1, 1 + patches, dim], taken as a square."""
    if len(position) != 3 or position[0] != 1 or position[2] != config.dim or position[1] < 2:
        return None
    side = isqrt(position[1] - 1)
    if side * side != position[1] - 1:
        return None
    return side * config.patch_size[0], side * config.patch_size[1]


def draw(config: VitConfig, seed: int) -> dict[str, Tensor]:
    """Draw seeded weights: msn's own initialisation, with biases and gains that are not neutral.

    Zero biases and unit gains would hide a dropped bias or a swapped LayerNorm from every check.
    """
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in VitMsn(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        # facebookresearch/msn src/deit.py, _init_weights: trunc_normal_(std=.02)
        torch.nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
        gain = "norm" in name and name.endswith("weight")
        tensors[name] = tensor + 1.0 if gain else tensor
    return tensors
