"""Read a Hugging Face ``config.json``, which is hostile input."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msn_export.errors import CheckpointError
from msn_export.models.variants import VitConfig

MODEL_TYPE = "vit_msn"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_LIMIT = 16 * 2**20  # bytes; ImageNet-21k's labels are a megabyte


@dataclass(frozen=True, slots=True)
class Processor:
    """The image processor's configuration beside a checkpoint: its file's name and fields."""

    file: str
    fields: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; is this a Hugging Face model folder?")
    if path.stat().st_size > _LIMIT:
        raise CheckpointError(f"{path} is larger than a configuration can be")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return parsed


def read_processor(folder: Path) -> Processor | None:
    """Find the image processor's configuration of a model folder, in transformers' order.

    ``processor_config.json`` holds it under ``image_processor`` since transformers 5, and goes
    first; many such files hold none.

    Raises:
        CheckpointError: a file is no JSON object.
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


def parse_config(config: Mapping[str, Any], where: str, classes: int = 0) -> VitConfig:
    """Make a shape from a parsed config.json; defaults are transformers' ViTMSNConfig's.

    Args:
        config: the parsed file.
        where: what to call it in errors.
        classes: rows of the classifier among the weights, 0 without one.

    Raises:
        CheckpointError: another model's file, a wrong type, or numbers that cannot be.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    named = isinstance(architectures, list) and any("ViTMSN" in str(x) for x in architectures)
    if model_type != MODEL_TYPE and not (model_type is None and named):
        raise CheckpointError(
            f"{where} is of model type {model_type!r}; expected {MODEL_TYPE!r} "
            "(this tool exports ViT-MSN only)"
        )

    def number(name: str, default: int) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{where}: {name} is {value!r}; expected an integer")
        return value

    eps = config.get("layer_norm_eps", 1e-6)
    if not isinstance(eps, float):  # no integer lies between 0 and 1
        raise CheckpointError(f"{where}: layer_norm_eps is {eps!r}; expected as in 1e-6")
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
            labels=parse_labels(config.get("id2label"), classes, where),
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


def parse_labels(id2label: Any, classes: int, where: str) -> tuple[str, ...]:
    """Give the classifier's labels in the order of its rows.

    Raises:
        CheckpointError: the ids are not 0 to n - 1, or there are not as many as classes.
    """
    if classes == 0:
        return ()
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(classes))  # as transformers names them
    if not isinstance(id2label, dict):
        raise CheckpointError(f"{where}: id2label is no object of id to label")
    labels = {str(key): str(label) for key, label in id2label.items()}
    if len(labels) != classes or any(str(i) not in labels for i in range(classes)):
        raise CheckpointError(
            f"{where}: id2label has {len(labels)} labels, the classifier {classes} rows; "
            f"expected ids 0 to {classes - 1}"
        )
    return tuple(labels[str(i)] for i in range(classes))
