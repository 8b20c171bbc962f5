"""Find a checkpoint wherever a user keeps it, and load it as the reference model."""

import hashlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.config import (
    READS,
    VARIANTS,
    VIT_MSN,
    Family,
    Processor,
    VitConfig,
    family_of,
    named_variant,
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
    model_in_memory,
    near,
    require_model,
    seeded,
)
from msn_export.models.state_dict import Keys, Weights, rename, unwrap
from msn_export.models.vit import VitMsn
from msn_export.models.weights import read_file, read_folder

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

    Args:
        tensors: by the file's names.
        config: the shape, with the classifier that ``with_classifier`` found among the weights.
        where: what to call the file in errors.
        origin: where the configuration is from, for the error where shapes contradict it.
        family: says which keys are left unread.
    """
    keys = rename(tensors, where, family)
    with torch.device("meta"):
        model = VitMsn(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _require_keys(shapes, keys, tensors, (where, origin))
    _require_plain(keys, tensors, where)
    notes = _notes(keys, tensors, config)
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for name in sorted(shapes):
        tensor = _take(name, keys.known, tensors)
        # NaN and infinity reach the sum, which is far cheaper than asking each number
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            found = keys.known.get(name, name)
            raise CheckpointError(f"{where}: weight {found!r} has NaN or infinity")
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data.cast("B"))
        state[name] = tensor
    model.requires_grad_(requires_grad=False)
    model.load_state_dict(state, assign=True)
    return Assembled(model.eval(), digest.hexdigest(), notes)


def _take(name: str, known: Mapping[str, str], tensors: dict[str, Tensor]) -> Tensor:
    if name in known:
        found = tensors.pop(known[name])
    else:  # a packed projection that the file has in three
        found = torch.cat([tensors.pop(known[name.replace("attn.qkv.", part)]) for part in _QKV])
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
        if ".attn.qkv." in name and name not in keys.known:
            for part in _QKV:
                wanted[name.replace("attn.qkv.", part)] = (shape[0] // 3, *shape[1:])
        else:
            wanted[name] = shape
    missing = [name for name in wanted if name not in keys.known]
    surplus = [key for name, key in keys.known.items() if name not in wanted]
    unexpected = [*keys.unknown, *surplus]
    odd = [
        f"{_shown(key)} is {list(tensors[key].shape)}, expected {list(wanted[name])}"
        for name, key in keys.known.items()
        if name in wanted and tuple(tensors[key].shape) != wanted[name]
    ]
    if not (missing or unexpected or odd):
        return
    counts = (
        f"{_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}, "
        f"{_some(odd, 'of another shape')}"
    )
    if odd or surplus:  # weights of a ViT-MSN, of another shape than was said
        raise CheckpointError(f"{where}: {counts}; the shape is from {origin}: is it right?")
    if missing:
        raise CheckpointError(f"{where}: {counts}; the file is not whole, or of another model")
    raise CheckpointError(
        f"{where}: {counts}; all of a ViT-MSN is there and more that it would not compute, so the "
        "file is of another model; remove the keys if you know that they are not used"
    )


def _require_plain(keys: Keys, tensors: Mapping[str, Tensor], where: str) -> None:
    """Require dense floating-point numbers: a pickle may hold tensors that are neither."""
    for key in keys.known.values():
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


def _some(keys: Sequence[str], what: str) -> str:
    listed = ", ".join(map(_shown, keys[:5])) + (", …" if len(keys) > 5 else "")
    count = "1 key" if len(keys) == 1 else f"{len(keys)} keys"
    return f"{count} {what}" + (f" ({listed})" if keys else "")


def _shown(key: str) -> str:
    """Give a key as a message may hold it: a terminal obeys some characters."""
    return key if key.isprintable() else ascii(key)


def _notes(keys: Keys, tensors: Mapping[str, Tensor], config: VitConfig) -> tuple[str, ...]:
    notes = [f"not read: {_some(found, why)}" for why, found in keys.unread.items()]
    if config.labels and config.pooling == "blocks":
        notes.append(
            f"the classifier is msn's linear evaluation and reads {READS['blocks']} "
            f"({config.pooled_blocks}); norm 1 before the linear layer is assumed, as in its "
            "configuration (normalize: true), for the file does not say; its evaluation prepares "
            "images as --preprocess msn-eval does"
        )
    if config.labels and keys.known.get("classifier.weight", "").endswith("head.weight"):
        read = READS[config.pooling]
        notes.append(f"the classifier is {keys.known['classifier.weight']!r} and reads {read}")
    converted = sorted({_short(tensors[key].dtype) for key in keys.known.values()} - {"float32"})
    if converted:
        notes.append(f"weights were {', '.join(converted)}, read as float32")
    return tuple(notes)


def classes_of(tensors: Mapping[str, Tensor], where: str) -> int:
    """Count the classifier's rows; 0 without a classifier."""
    known = rename(tensors, where).known
    key = known.get("classifier.weight") or known.get("classifier.linear.weight")
    if key is None:
        return 0
    shape = tuple(tensors[key].shape)
    if len(shape) != 2 or shape[0] == 0:
        raise CheckpointError(
            f"{where}: {_shown(key)} is {list(shape)}; expected [classes, hidden size]"
        )
    return shape[0]


def with_classifier(tensors: Mapping[str, Tensor], config: VitConfig, where: str) -> VitConfig:
    """Give the configuration with what the classifier among the weights reads."""
    known = rename(tensors, where).known
    probe = known.get("classifier.linear.weight")
    if probe is not None:
        width = tuple(tensors[probe].shape)[-1]
        blocks, rest = divmod(width, config.dim)
        if rest or not 1 <= blocks <= config.depth:
            raise CheckpointError(
                f"{where}: {_shown(probe)} reads {width} numbers; expected a multiple of the "
                f"hidden size {config.dim}, for up to {config.depth} blocks"
            )
        return replace(config, pooling="blocks", pooled_blocks=blocks)
    if "fc_norm.weight" in known and "classifier.weight" in known:
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
    """Tell the shape of weights that come without a config.json.

    A published shape is found by patch, width and depth; the image size is that of the position
    embedding.
    """
    known = rename(tensors, where).known
    if not known:
        keys = ", ".join(map(_shown, list(tensors)[:3]))
        raise CheckpointError(f"{where} holds no weights of a ViT-MSN; its keys are such as {keys}")
    labels = tuple(f"LABEL_{i}" for i in range(classes_of(tensors, where)))
    patch, position = (
        tuple(tensors[known[name]].shape) if name in known else ()
        for name in ("patch.weight", "pos_embed")
    )
    depth = len({name.split(".")[1] for name in known if name.startswith("blocks.")})
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
        case "memory":
            return _from_memory(source, choices)
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


def _from_memory(source: str, choices: Choices) -> Checkpoint:
    """Copy a model: what is exported does not change where training goes on."""
    model = model_in_memory(source)
    for wrapper in ("_orig_mod", "module"):  # of torch.compile, of DataParallel
        model = getattr(model, wrapper, model)
    if choices.weights is not None:
        raise CheckpointError(f"checkpoint {source!r} is one model: it has no --weights to choose")
    tensors = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    classes = classes_of(tensors, f"checkpoint {source}")
    named = read_labels(choices.labels, classes) if choices.labels is not None else None
    if isinstance(model, VitMsn):
        labels = named if named is not None else model.config.labels
        shaped = Shaped(replace(model.config, labels=labels), "its own configuration")
    else:
        if not hasattr(getattr(model, "config", None), "to_dict"):
            raise CheckpointError(
                f"checkpoint {source!r} has no configuration; expected a model of transformers, "
                "or save it and give the file"
            )
        config = parse_config(model.config.to_dict(), source, classes, named)
        shaped = Shaped(config, "its own configuration")
    return _load(unwrap(tensors, f"checkpoint {source}"), shaped, source, None)


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
    parsed, where = read_json(beside), str(beside)
    family = family_of(parsed, where)
    notes = (family.note,) if family.note else ()
    return Shaped(parse_config(parsed, where, classes, named), where, notes, family)


def _load(weights: Weights, shaped: Shaped, source: str, processor: Processor | None) -> Checkpoint:
    where = f"checkpoint {source}"
    config = with_classifier(weights.tensors, shaped.config, where)
    made = assemble(weights.tensors, config, where, shaped.origin, shaped.family)
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
