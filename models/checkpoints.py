"""Find a checkpoint wherever a user keeps it, and load it as the reference model."""

import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.assemble import Shaped, assemble, classes_of, config_of, with_classifier
from msn_export.models.hf_config import (
    Processor,
    parse_config,
    read_json,
    read_labels,
    read_processor,
)
from msn_export.models.named import (
    ADAPTER,
    AS_IT_SAYS,
    Choices,
    kind_of,
    near,
    require_model,
    seeded,
)
from msn_export.models.variants import VitConfig, named_variant
from msn_export.models.vit_msn import VitMsn
from msn_export.models.weights import read_file, read_folder
from msn_export.models.wrappers import Weights


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
    source: str, choices: Choices = AS_IT_SAYS, *, revision: str | None = None
) -> Checkpoint:
    """Load a hub id, a Hugging Face folder, a weights file, or ``random:VARIANT[:SEED]``.

    Args:
        source: what the user gave; a hub id may end in ``@revision``.
        choices: what it does not say, or holds several of. A variant wins over a config.json
            beside the file, labels over its ``id2label``.
        revision: of a hub id.

    Raises:
        CheckpointError: there is no such thing, or it cannot be used; the message says why.
    """
    match kind_of(source, choices.variant):
        case "random":
            if choices:
                raise CheckpointError(
                    f"checkpoint {source!r} is drawn: it has no --weights and no --labels to choose"
                )
            return _random(source)
        case "file":
            return _from_file(Path(source), choices)
        case "folder":
            return _from_folder(Path(source), source, choices)
        case "hub":
            name, _, at = source.partition("@")
            folder = _download(name, at or revision)
            return _from_folder(folder, f"{name}@{folder.name}", choices)


def _from_folder(folder: Path, source: str, choices: Choices) -> Checkpoint:
    require_model(folder, source)
    beside = folder / "config.json"
    parse_config(read_json(beside), str(beside))  # before gigabytes are read
    weights = read_folder(folder, choices.weights)
    return _load(weights, _beside(weights, beside, source, choices), source, read_processor(folder))


def _from_file(path: Path, choices: Choices) -> Checkpoint:
    where, beside = f"checkpoint {path}", path.parent / "config.json"
    weights = read_file(path, choices.weights)
    if choices.variant is None and beside.is_file():
        shaped = _beside(weights, beside, str(path), choices)
    else:
        shaped = config_of(weights.tensors, choices.variant, where)
        if choices.labels is not None:
            labels = read_labels(choices.labels, len(shaped.config.labels))
            shaped = replace(shaped, config=replace(shaped.config, labels=labels))
    return _load(weights, shaped, str(path), read_processor(path.parent))


def _beside(weights: Weights, beside: Path, source: str, choices: Choices) -> Shaped:
    """Read the shape off a config.json."""
    classes = classes_of(weights.tensors, f"checkpoint {source}")
    named = read_labels(choices.labels, classes) if choices.labels is not None else None
    config = parse_config(read_json(beside), str(beside), classes, named)
    return Shaped(config, str(beside))


def _load(weights: Weights, shaped: Shaped, source: str, processor: Processor | None) -> Checkpoint:
    where = f"checkpoint {source}"
    config = with_classifier(weights.tensors, shaped.config, where)
    made = assemble(weights.tensors, config, where, shaped.origin)
    notes = (*weights.notes, *shaped.notes, *made.notes)
    return Checkpoint(source, made.sha256, config, made.model, processor, notes)


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
    made = assemble(tensors, config, where, variant)
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
    about = ["config.json", "preprocessor_config.json", ADAPTER]
    safe = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*about, *safe]))
        if not any(folder.glob("model*.safetensors")):
            # of the commit that the configuration is of: a branch may have moved
            commit = folder.name
            folder = Path(
                snapshot_download(name, revision=commit, allow_patterns=[*about, *pickled])
            )
    except Exception as error:  # its own errors, and those of whatever carries its requests
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
        raise CheckpointError(
            f"hub checkpoint {shown!r} cannot be had ({reason}); check the name and the network, "
            f"or give a local folder{near(name)}"
        ) from error
    return folder
