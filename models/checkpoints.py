"""Find a checkpoint wherever a user keeps it, and load it as the reference model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.assemble import assemble, config_of, named_variant
from msn_export.models.hf_config import parse_config, read_json
from msn_export.models.keys import rename
from msn_export.models.variants import VitConfig
from msn_export.models.vit_msn import VitMsn
from msn_export.models.weights import read_file, read_folder

WEIGHTS = (".safetensors", ".bin", ".pth", ".tar", ".pt")
_HUB_ID = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,128}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    ``sha256`` is that of the weights as float32 under our names, in order: the same weights have
    the same hash in whatever file they lie. ``model`` is in eval mode, float32, on the CPU.
    ``processor`` is the parsed preprocessor_config.json, if there is one.
    """

    source: str
    sha256: str
    config: VitConfig
    model: VitMsn
    processor: Mapping[str, Any] | None
    notes: tuple[str, ...]


def load_checkpoint(
    source: str, *, variant: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Load a hub id, a Hugging Face folder, a weights file, or ``random:VARIANT[:SEED]``.

    Args:
        source: what the user gave; a hub id may end in ``@revision``.
        variant: the published shape of a weights file that does not say.
        revision: of a hub id.

    Raises:
        CheckpointError: there is no such thing, or it cannot be used; the message says why.
    """
    path = Path(source)
    if source.startswith("random:"):
        return _random(source)
    if path.is_dir():
        return _from_folder(path, str(path))
    if path.is_file():
        return _from_file(path, variant)
    match = _HUB_ID.fullmatch(source)
    if match is None or source.endswith(WEIGHTS) or source.startswith((".", "/")):
        raise CheckpointError(
            f"checkpoint {source!r} does not exist; expected a folder, a weights file "
            f"({', '.join(WEIGHTS)}), a hub id such as facebook/vit-msn-small, or random:VARIANT"
        )
    name, at = match[1], match[2] or revision
    folder = _download(name, at)
    return _from_folder(folder, f"{name}@{folder.name}")


def _from_folder(folder: Path, source: str) -> Checkpoint:
    written = read_json(folder / "config.json")
    where = f"checkpoint {source}"
    parse_config(written, f"{folder / 'config.json'}")  # before gigabytes are read
    tensors = read_folder(folder)
    config = parse_config(written, f"{folder / 'config.json'}", _classes(tensors))
    path = folder / "preprocessor_config.json"
    processor = read_json(path) if path.is_file() else None
    return _load(tensors, config, source, where, processor)


def _from_file(path: Path, variant: str | None) -> Checkpoint:
    tensors = read_file(path)
    beside = path.parent / "config.json"
    where = f"checkpoint {path}"
    if variant is None and beside.is_file():
        config = parse_config(read_json(beside), str(beside), _classes(tensors))
    else:
        config = config_of(tensors, variant, where)
    return _load(tensors, config, str(path), where, None)


def _load(
    tensors: dict[str, Tensor],
    config: VitConfig,
    source: str,
    where: str,
    processor: Mapping[str, Any] | None,
) -> Checkpoint:
    made = assemble(tensors, config, where)
    return Checkpoint(source, made.sha256, config, made.model, processor, made.notes)


def _classes(tensors: Mapping[str, Tensor]) -> int:
    """Count the classifier's rows; 0 without one."""
    key = rename(tensors)[0].get("classifier.weight")
    return 0 if key is None else len(tensors[key])


def _random(source: str) -> Checkpoint:
    """Draw seeded weights: msn's own initialisation, with biases and gains that are not neutral.

    Zero biases and unit gains would hide a dropped bias or a swapped LayerNorm from every check.
    """
    parts = source.split(":")
    if len(parts) not in {2, 3} or (len(parts) == 3 and not re.fullmatch(r"\d{1,9}", parts[2])):
        raise CheckpointError(f"checkpoint {source!r} is malformed; expected random:VARIANT[:SEED]")
    config, seed = named_variant(parts[1]), int(parts[2]) if len(parts) == 3 else 0
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
    where = f"random:{parts[1]}:{seed}"
    made = _load(tensors, config, where, where, None)
    note = f"seeded random weights (seed {seed}), not a trained model"
    return Checkpoint(where, made.sha256, config, made.model, None, (*made.notes, note))


def _download(name: str, revision: str | None) -> Path:
    """Fetch a hub repository's configuration and weights into the hub's own cache.

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured by huggingface_hub itself.

    Raises:
        CheckpointError: there is no such repository or revision, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    shown = f"{name}@{revision}" if revision else name
    about = ["config.json", "preprocessor_config.json"]
    safe = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*about, *safe]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*about, *pickled])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"hub checkpoint {shown!r} cannot be had ({reason}); check the name and the network, "
            "or give a local folder"
        ) from error
    return folder
