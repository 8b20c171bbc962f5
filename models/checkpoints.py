"""Find a checkpoint wherever a user keeps it, and load it as the reference model."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.assemble import assemble, classes_of, config_of
from msn_export.models.hf_config import (
    PREPROCESSOR,
    PROCESSOR,
    Processor,
    parse_config,
    read_json,
    read_processor,
)
from msn_export.models.named import kind_of, seeded
from msn_export.models.variants import VitConfig, named_variant
from msn_export.models.vit_msn import VitMsn
from msn_export.models.weights import read_file, read_folder


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    ``sha256`` is that of the weights as float32 under our names, in order: the same weights have
    the same hash in whatever file they lie. ``model`` is in eval mode, float32, on the CPU.
    ``processor`` is the image processor's configuration beside it, if there is one.
    """

    source: str
    sha256: str
    config: VitConfig
    model: VitMsn
    processor: Processor | None
    notes: tuple[str, ...]


def load_checkpoint(
    source: str, *, variant: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Load a hub id, a Hugging Face folder, a weights file, or ``random:VARIANT[:SEED]``.

    Args:
        source: what the user gave; a hub id may end in ``@revision``.
        variant: the published shape of a weights file; wins over a config.json beside it.
        revision: of a hub id.

    Raises:
        CheckpointError: there is no such thing, or it cannot be used; the message says why.
    """
    match kind_of(source, variant):
        case "random":
            return _random(source)
        case "file":
            return _from_file(Path(source), variant)
        case "folder":
            return _from_folder(Path(source), source)
        case "hub":
            name, _, at = source.partition("@")
            folder = _download(name, at or revision)
            return _from_folder(folder, f"{name}@{folder.name}")


def _from_folder(folder: Path, source: str) -> Checkpoint:
    where, beside = f"checkpoint {source}", folder / "config.json"
    written = read_json(beside)
    parse_config(written, str(beside))  # before gigabytes are read
    tensors = read_folder(folder)
    config = parse_config(written, str(beside), classes_of(tensors, where))
    return _load(tensors, config, source, where, read_processor(folder))


def _from_file(path: Path, variant: str | None) -> Checkpoint:
    where, beside = f"checkpoint {path}", path.parent / "config.json"
    tensors = read_file(path)
    if variant is None and beside.is_file():
        config = parse_config(read_json(beside), str(beside), classes_of(tensors, where))
    else:
        config = config_of(tensors, variant, where)
    return _load(tensors, config, str(path), where, read_processor(path.parent))


def _load(
    tensors: dict[str, Tensor],
    config: VitConfig,
    source: str,
    where: str,
    processor: Processor | None,
) -> Checkpoint:
    made = assemble(tensors, config, where)
    return Checkpoint(source, made.sha256, config, made.model, processor, made.notes)


def _random(source: str) -> Checkpoint:
    """Draw seeded weights: msn's own initialisation, with biases and gains that are not neutral.

    Zero biases and unit gains would hide a dropped bias or a swapped LayerNorm from every check.
    """
    variant, seed = seeded(source)
    config = named_variant(variant)
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
    where = f"random:{variant}:{seed}"
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

    shown = f"{name}@{revision}" if revision else name
    about = ["config.json", PREPROCESSOR, PROCESSOR]
    safe = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*about, *safe]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*about, *pickled])
            )
    except Exception as error:  # its own errors, and those of whatever carries its requests
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
        raise CheckpointError(
            f"hub checkpoint {shown!r} cannot be had ({reason}); check the name and the network, "
            "or give a local folder"
        ) from error
    return folder
