"""What a user may name as a checkpoint, told without opening it. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from msn_export.errors import CheckpointError
from msn_export.models.variants import named_variant

Kind = Literal["random", "file", "folder", "hub"]

WEIGHTS = (".safetensors", ".bin", ".pth", ".tar", ".pt")
BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(?:@[\w./-]{1,128})?", re.ASCII)


def kind_of(source: str, variant: str | None = None) -> Kind:
    """Say what a user named, and refuse what could not be loaded whatever is in it.

    Args:
        source: the name, as ``load_checkpoint`` takes it.
        variant: the published shape that was given for a weights file.

    Raises:
        CheckpointError: there is no such thing, or ``variant`` does not go with it or is unknown.
    """
    kind = _kind_of(source)
    if variant is not None and kind != "file":
        raise CheckpointError(
            f"checkpoint {source!r} says its own shape; --variant is for a weights file"
        )
    if kind == "random":
        variant, _ = seeded(source)
    if variant is not None:
        named_variant(variant)
    return kind


def files_of(source: str) -> list[Path]:
    """List the files of a checkpoint that lies here, as far as loading it may read them."""
    path = Path(source)
    if path.is_dir():
        wanted = (*WEIGHTS, ".index.json", *BESIDE)
        return [file for file in path.iterdir() if file.name.endswith(wanted)]
    return [path, *(path.parent / name for name in BESIDE)] if path.is_file() else []


def seeded(source: str) -> tuple[str, int]:
    """Read the variant and the seed out of ``random:VARIANT[:SEED]``.

    Raises:
        CheckpointError: it is written otherwise.
    """
    parts = source.split(":")
    if len(parts) not in {2, 3} or (len(parts) == 3 and not re.fullmatch(r"\d{1,9}", parts[2])):
        raise CheckpointError(f"checkpoint {source!r} is malformed; expected random:VARIANT[:SEED]")
    return parts[1], int(parts[2]) if len(parts) == 3 else 0


def _kind_of(source: str) -> Kind:
    if source.startswith("random:"):
        return "random"
    try:
        if source and Path(source).is_dir():  # Path("") is the current folder
            return "folder"
        if Path(source).is_file():
            return "file"
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise CheckpointError(
            f"checkpoint {source[:200]!r} cannot be read: {error.strerror}"
        ) from error
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id and not source.endswith(WEIGHTS) and not source.startswith("."):
        return "hub"
    raise CheckpointError(
        f"checkpoint {source!r} does not exist; expected a folder, a weights file "
        f"({', '.join(WEIGHTS)}), a hub id such as facebook/vit-msn-small, or random:VARIANT"
    )
