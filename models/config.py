"""The shapes that were published, and a Hugging Face ``config.json``, which is hostile input."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msn_export.errors import CheckpointError
from msn_export.input_files import CONFIGURATION, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# No real ViT comes near these; a hostile config.json may, and a model is built from it
_LARGEST = 1 << 20
_DEEPEST = 1024


# What a classifier reads. cls: transformers, torchvision, timm, MAE with --cls_token; patches: MAE,
# timm with global_pool="avg", both with a LayerNorm behind it; blocks: facebookresearch/msn
# linear_eval.py; features: facebookresearch/msn logistic_eval.py
Pooling = Literal["cls", "patches", "blocks", "features"]
READS = {
    "cls": "[CLS] after the final LayerNorm",
    "patches": "the mean of the last block's patches",
    "blocks": "[CLS] of the last blocks before the final LayerNorm",
    "features": "[CLS] of the last blocks before the final LayerNorm, centred and of norm 1",
}


# what is computed and read, which a checkpoint does not say: left out of JSON where it is all of it
_READOUT: Mapping[str, Any] = {"kept": (), "blocks": 1, "normalize": False}


@dataclass(frozen=True, slots=True)
class VitConfig:
    """The shape of a model. Sizes are (height, width) in pixels; ``labels`` () means no head.

    ``pooling`` is what the classifier reads, ``pooled_blocks`` of how many last blocks. A model
    whose pooling is ``patches`` or ``blocks`` has no final LayerNorm. ``problem_type`` is
    transformers' word for what a head's outputs mean; None says nothing.

    ``kept`` are the patches that are computed, all where it is empty, in ascending order from 0;
    ``blocks`` of how many last blocks the heads ``cls`` and ``features`` hold [CLS]; ``normalize``
    gives the rows of ``cls``, ``mean`` and ``features`` norm 1.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    eps: float = 1e-6
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()
    pooling: Pooling = "cls"
    pooled_blocks: int = 1
    problem_type: str | None = None
    kept: tuple[int, ...] = ()
    blocks: int = 1
    normalize: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "image height": self.image_size[0],
            "image width": self.image_size[1],
            "patch height": self.patch_size[0],
            "patch width": self.patch_size[1],
            "channels": self.channels,
            "hidden size": self.dim,
            "layers": self.depth,
            "attention heads": self.heads,
            "intermediate size": self.mlp_dim,
        }
        for name, size in sizes.items():
            most = _DEEPEST if name == "layers" else _LARGEST
            if not 1 <= size <= most:
                raise CheckpointError(f"{name} {size} is out of range; expected 1 to {most}")
        if self.dim % self.heads:
            raise CheckpointError(
                f"hidden size {self.dim} is not divisible by {self.heads} attention heads"
            )
        if not 1 <= self.pooled_blocks <= self.depth:
            raise CheckpointError(
                f"a classifier reads {self.pooled_blocks} blocks; expected 1 to {self.depth}"
            )
        if not 1 <= self.blocks <= self.depth:
            raise CheckpointError(
                f"blocks {self.blocks} is out of range; expected 1 to {self.depth}"
            )
        patches = self.tokens - 1
        ascending = all(a < b for a, b in zip((-1, *self.kept), (*self.kept, patches), strict=True))
        if not ascending:
            raise CheckpointError(
                f"kept patches are not ascending numbers from 0 to {patches - 1} of this image size"
            )
        if not 0 < self.eps < 1:
            raise CheckpointError(f"LayerNorm eps {self.eps} is out of range; expected 1e-6 or so")
        for side, image, patch in zip(
            ("height", "width"), self.image_size, self.patch_size, strict=True
        ):
            if image % patch:
                below = image - image % patch
                nearest = f"sizes are {below} and {below + patch}" if below else f"size is {patch}"
                raise CheckpointError(
                    f"image {side} {image} is not divisible by the patch's {patch}; "
                    f"nearest {nearest}"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def tokens(self) -> int:
        """The image's patches and [CLS]."""
        return self.grid[0] * self.grid[1] + 1

    @property
    def has_final_norm(self) -> bool:
        """True if the tokens go through a final LayerNorm."""
        return self.pooling in {"cls", "features"}

    @property
    def sequence(self) -> int:
        """Tokens that the blocks compute: [CLS], and the patches that are kept."""
        return 1 + len(self.kept) if self.kept else self.tokens

    def for_image_size(self, size: tuple[int, int]) -> VitConfig:
        return replace(self, image_size=size)

    def to_json(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in _READOUT or value != _READOUT[name]
        }


@dataclass(frozen=True, slots=True, eq=False)
class LinearClassifier:
    """A linear classifier without intercept for a backbone that has none.

    ``weight`` [classes, blocks * dim] fp32 has a row for each of ``labels``. ``pooling`` is
    ``features`` or ``cls``: what it reads, of the last ``blocks`` blocks side by side.
    """

    weight: NDArray[np.float32]
    labels: tuple[str, ...]
    pooling: Pooling
    blocks: int = 1


def readout_in(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read what a graph computes and reads off its model, out of its manifest's configuration.

    Args:
        config: as ``to_json`` gave it, maybe damaged since.
        where: what to call the manifest in errors.
    """
    given = {name: config.get(name, default) for name, default in _READOUT.items()}
    kept = given["kept"]
    if not (
        isinstance(kept, list | tuple)
        and all(type(patch) is int for patch in kept)
        and type(given["blocks"]) is int
        and type(given["normalize"]) is bool
    ):
        raise CheckpointError(f"{where}: its configuration says {given}, which no export writes")
    return {**given, "kept": tuple(kept)}


def _vit(patch: int, dim: int, depth: int, heads: int) -> VitConfig:
    # facebookresearch/msn src/deit.py: mlp_ratio=4, qkv_bias=True, LayerNorm eps 1e-6; images of
    # 224 pixels, main config configs/pretrain/msn_vits16.yaml (rand_size: 224)
    return VitConfig((224, 224), (patch, patch), 3, dim, depth, heads, 4 * dim)


# facebookresearch/msn README, "Pre-trained models", and the src/deit.py function of each:
VARIANTS = {
    "vit-msn-small": _vit(16, 384, 12, 6),  # vits16_800ep.pth.tar, deit_small
    "vit-msn-base": _vit(16, 768, 12, 12),  # vitb16_600ep.pth.tar, deit_base
    "vit-msn-large": _vit(16, 1024, 24, 16),  # vitl16_600ep.pth.tar, deit_large
    "vit-msn-base-4": _vit(4, 768, 12, 12),  # vitb4_300ep.pth.tar, deit_base_p4
    "vit-msn-large-7": _vit(7, 1024, 24, 16),  # vitl7_200ep.pth.tar, deit_large_p7
}


def named_variant(name: str) -> VitConfig:
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise CheckpointError(
            f"variant {name!r} is unknown; expected one of {', '.join(VARIANTS)}{meant}"
        )
    return VARIANTS[name]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models with the block of ViT-MSN, and what differs in transformers' files.

    ``prefix`` stands before an encoder's keys in a classifier's file. ``defaults`` are those of
    config.json. ``ignored`` are beginnings of keys that are left unread, each with what they are.
    ``note`` is what a user should know of the family.
    """

    model_type: str
    prefix: str
    defaults: Mapping[str, Any]
    ignored: Mapping[str, str]
    note: str = ""


# transformers models/vit_msn and models/vit. All else of a config.json, and every name of a weight,
# is the same in both.
VIT_MSN = Family(
    "vit_msn",
    "vit.",
    {"layer_norm_eps": 1e-6},
    {"pooler.": "that transformers ignores with a warning"},
)
FAMILIES = (
    VIT_MSN,
    Family(
        "vit",
        "vit.",
        {"layer_norm_eps": 1e-12},
        {"pooler.": "of ViTModel's pooler, which no head reads"},
        "a plain ViT: same architecture, checked, not the product's subject",
    ),
)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Find the family of a parsed config.json; ``where`` is what to call the file in errors."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    architectures = config.get("architectures") or []
    named = isinstance(architectures, list) and any("ViTMSN" in str(x) for x in architectures)
    if model_type is None and named:
        return VIT_MSN
    expected = " or ".join(repr(family.model_type) for family in FAMILIES)
    raise CheckpointError(
        f"{where} is of model type {model_type!r}; expected {expected} "
        "(models with the architecture of ViT-MSN)"
    )


PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# What a folder's weights are called, whole and sharded, the safe format first
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# transformers configuration_utils.PreTrainedConfig
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_LIMIT = 16 * 2**20  # bytes; ImageNet-21k's labels are a megabyte


@dataclass(frozen=True, slots=True)
class Processor:
    """The image processor's configuration beside a checkpoint: its file's name and fields."""

    file: str
    fields: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    parsed = parse_json(path)
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return parsed


def parse_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; is this a Hugging Face model folder?")
    return read_bytes(path, CONFIGURATION).decode()


def read_processor(folder: Path) -> Processor | None:
    """Find the image processor's configuration of a model folder, in transformers' order.

    ``processor_config.json`` holds it under ``image_processor`` since transformers 5, and goes
    first; many such files hold none.
    """
    nested, plain = folder / PROCESSOR, folder / PREPROCESSOR
    if nested.is_file():
        parsed = read_json(nested)
        fields = image_processor_of(parsed)
        if fields is not parsed:
            return Processor(PROCESSOR, fields)
    return Processor(PREPROCESSOR, read_json(plain)) if plain.is_file() else None


def image_processor_of(parsed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the image processor's fields of a ``processor_config.json``; others are as they are."""
    nested = parsed.get("image_processor")
    return nested if isinstance(nested, Mapping) else parsed


def parse_config(
    config: Mapping[str, Any],
    where: str,
    classes: int = 0,
    labels: tuple[str, ...] | None = None,
) -> VitConfig:
    """Make a shape from a parsed config.json; defaults are those of its family.

    Args:
        config: the parsed file.
        where: what to call it in errors.
        classes: rows of the classifier among the weights, 0 without one.
        labels: the classes' names instead of the file's own.
    """
    config = {**family_of(config, where).defaults, **config}
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{where} is of a quantised model ({method or 'quantization_config'}); give the "
            "checkpoint it was made from, and quantise the exported graph with msn-export calibrate"
        )

    def number(name: str, default: int) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} is {value!r}; expected an integer")
        return value

    eps = config["layer_norm_eps"]
    if not isinstance(eps, float):  # no integer lies between 0 and 1
        raise CheckpointError(f"{where}: layer_norm_eps is {eps!r}; expected as in 1e-6")
    problem = config.get("problem_type")
    if problem is not None and problem not in PROBLEM_TYPES:
        raise CheckpointError(
            f"{where}: problem_type is {problem!r}; expected {', '.join(PROBLEM_TYPES)} or null"
        )
    activation, bias = config.get("hidden_act", "gelu"), config.get("qkv_bias", True)
    if not isinstance(activation, str) or not isinstance(bias, bool):
        raise CheckpointError(f"{where}: hidden_act must be text and qkv_bias true or false")
    try:
        return VitConfig(
            image_size=_pair(config.get("image_size", 224), f"{where}: image_size"),
            patch_size=_pair(config.get("patch_size", 16), f"{where}: patch_size"),
            channels=number("num_channels", 3),
            dim=number("hidden_size", 768),
            depth=number("num_hidden_layers", 12),
            heads=number("num_attention_heads", 12),
            mlp_dim=number("intermediate_size", 3072),
            activation=activation,
            eps=eps,
            qkv_bias=bias,
            labels=parse_labels(config, classes, where) if labels is None else labels,
            problem_type=problem,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def _pair(value: Any, name: str) -> tuple[int, int]:
    pair = [value, value] if isinstance(value, int) else value
    valid = (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    )
    if not valid:
        raise CheckpointError(f"{name} is {value!r}; expected a number or [height, width]")
    return pair[0], pair[1]


def parse_labels(config: Mapping[str, Any], classes: int, where: str) -> tuple[str, ...]:
    """Give the classifier's labels in the order of its rows, from ``id2label``.

    Where that is missing ``label2id`` says them, which transformers would pass over.
    """
    if classes == 0:
        return ()
    id2label, label2id = config.get("id2label"), config.get("label2id")
    if id2label is None and isinstance(label2id, dict):
        id2label = {str(number): label for label, number in label2id.items()}
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(classes))  # as transformers names them
    if not isinstance(id2label, dict):
        raise CheckpointError(f"{where}: id2label is no object of id to label{_REPLACE}")
    labels = {str(key): str(label) for key, label in id2label.items()}
    wanted = [str(i) for i in range(classes)]
    missing = [key for key in wanted if key not in labels]
    surplus = [key for key in labels if key not in set(wanted)]
    if missing or surplus:
        swapped = surplus and all(re.fullmatch(r"\d+", label) for label in labels.values())
        raise CheckpointError(
            f"{where}: the classifier has {classes} rows and id2label {len(labels)} labels: "
            f"{counted(missing, 'id', 'missing')}, {counted(surplus, 'id', 'surplus')}"
            f"{' (it maps labels to ids, as label2id should)' if swapped else ''}{_REPLACE}"
        )
    named = tuple(labels[key] for key in wanted)
    if isinstance(label2id, dict):
        # two classes of one name share an entry of label2id; other names are transformers' defaults
        uses = Counter(named)
        differ = [
            f"{i} ({label!r} is {label2id[label]!r} in label2id)"
            for i, label in enumerate(named)
            if label in label2id and uses[label] == 1 and str(label2id[label]) != str(i)
        ]
        if differ:
            raise CheckpointError(
                f"{where}: id2label and label2id contradict each other at id "
                f"{_first(differ)}{_REPLACE}"
            )
    return named


_REPLACE = "; --labels FILE replaces them"


def counted(items: Sequence[str], noun: str, what: str) -> str:
    """Count names and list the first, as in ``2 keys missing (a, b)``."""
    count = f"1 {noun}" if len(items) == 1 else f"{len(items)} {noun}s"
    return f"{count} {what}" + (f" ({_first(items)})" if items else "")


def _first(items: Sequence[str]) -> str:
    return ", ".join(map(shown, items[:5])) + (", …" if len(items) > 5 else "")


def shown(name: str) -> str:
    """Give a name as a message may hold it: a terminal obeys some characters."""
    return name if name.isprintable() else ascii(name)


def read_labels(path: Path, classes: int) -> tuple[str, ...]:
    """Read the names of a classifier's classes from a file, in the order of its rows.

    A ``.json`` file holds a list of labels, an object of id to label, or a config.json with one
    under ``id2label``. Any other file is text with one label a line.
    """
    if classes == 0:
        raise CheckpointError(f"--labels {path}: the checkpoint has no classifier")
    if not path.is_file():
        raise CheckpointError(f"--labels {path} does not exist")
    if path.suffix == ".json":
        parsed = parse_json(path)
        if isinstance(parsed, dict):
            held = parsed.get("id2label", parsed)
            return parse_labels({"id2label": _texts(held, path)}, classes, f"--labels {path}")
        lines = _texts(parsed, path)
    else:
        try:
            text = _read_text(path).removeprefix("\ufeff")
        except ValueError as error:
            raise CheckpointError(f"--labels {path} is not text: {error}") from error
        lines = text.removesuffix("\n").split("\n")
        empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
        if empty:
            raise CheckpointError(f"--labels {path}: line {empty[0]} is empty; expected one label")
    if len(lines) != classes:
        raise CheckpointError(
            f"--labels {path} has {len(lines)} labels and the classifier {classes} rows"
        )
    return tuple(line.strip() for line in lines)


def _texts(held: Any, path: Path) -> Any:
    texts = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"--labels {path}: expected a list of labels, or an object of id to label"
        )
    return held
