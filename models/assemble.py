"""Put a file's tensors into the model: every key used, none missing, every shape right."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msn_export.errors import CheckpointError
from msn_export.models.keys import Keys, rename
from msn_export.models.variants import VARIANTS, VitConfig, named_variant
from msn_export.models.vit_msn import VitMsn

_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_QKV = ("attn.q.", "attn.k.", "attn.v.")


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model with its weights, their hash, and what a user should know."""

    model: VitMsn
    sha256: str
    notes: tuple[str, ...]


def assemble(tensors: dict[str, Tensor], config: VitConfig, where: str) -> Assembled:
    """Build the model; ``tensors`` is emptied on the way, so that weights are held once.

    Raises:
        CheckpointError: keys are missing, unknown or mis-shaped (each named), or a weight is not
            made of finite floating-point numbers.
    """
    keys = rename(tensors, where)
    with torch.device("meta"):
        model = VitMsn(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _require_keys(shapes, keys, tensors, where)
    _require_plain(keys, tensors, where)
    notes = _notes(keys, tensors)
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
    model.load_state_dict(
        {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()},
        assign=True,
    )
    return Assembled(model.eval(), digest.hexdigest(), notes)


def _take(name: str, known: Mapping[str, str], tensors: dict[str, Tensor]) -> Tensor:
    if name in known:
        found = tensors.pop(known[name])
    else:  # a packed projection that the file has in three
        found = torch.cat([tensors.pop(known[name.replace("attn.qkv.", part)]) for part in _QKV])
    # a weight may be stored negated (torch: is_neg), which what reads its memory would not see
    return found.detach().resolve_neg().to(torch.float32).contiguous()


def _require_keys(
    shapes: Mapping[str, tuple[int, ...]], keys: Keys, tensors: Mapping[str, Tensor], where: str
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ".attn.qkv." in name and name not in keys.known:
            for part in _QKV:
                wanted[name.replace("attn.qkv.", part)] = (shape[0] // 3, *shape[1:])
        else:
            wanted[name] = shape
    missing = [name for name in wanted if name not in keys.known]
    unexpected = [*keys.unknown, *(key for name, key in keys.known.items() if name not in wanted)]
    odd = [
        f"{_shown(key)} is {list(tensors[key].shape)}, expected {list(wanted[name])}"
        for name, key in keys.known.items()
        if name in wanted and tuple(tensors[key].shape) != wanted[name]
    ]
    if missing or unexpected or odd:
        raise CheckpointError(
            f"{where}: {_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}, "
            f"{_some(odd, 'of another shape')}; is the configuration (--variant) right?"
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


def _notes(keys: Keys, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    notes = []
    if keys.unread:
        unread = _some(keys.unread, "of pre-training")
        notes.append(f"not read, as inference does not need it: {unread}")
    converted = sorted({_short(tensors[key].dtype) for key in keys.known.values()} - {"float32"})
    if converted:
        notes.append(f"weights were {', '.join(converted)}, read as float32")
    return tuple(notes)


def classes_of(tensors: Mapping[str, Tensor], where: str) -> int:
    """Count the classifier's rows; 0 without one.

    Raises:
        CheckpointError: the classifier is no matrix, or two keys are the same weight.
    """
    key = rename(tensors, where).known.get("classifier.weight")
    if key is None:
        return 0
    shape = list(tensors[key].shape)
    if len(shape) != 2 or shape[0] == 0:
        raise CheckpointError(f"{where}: {_shown(key)} is {shape}; expected [classes, hidden size]")
    return shape[0]


def config_of(tensors: Mapping[str, Tensor], variant: str | None, where: str) -> VitConfig:
    """Find the shape of weights that come without a config.json.

    Raises:
        CheckpointError: ``variant`` is unknown, or no published shape fits.
    """
    known = rename(tensors, where).known
    labels = tuple(f"LABEL_{i}" for i in range(classes_of(tensors, where)))
    if variant is not None:
        return replace(named_variant(variant), labels=labels)
    patch, position = (known.get(name) for name in ("patch.weight", "pos_embed"))
    if patch is not None and position is not None:
        blocks = {name.split(".")[1] for name in known if name.startswith("blocks.")}
        measured = (tuple(tensors[patch].shape), tuple(tensors[position].shape), len(blocks))
        for config in VARIANTS.values():
            shape = (config.dim, config.channels, *config.patch_size)
            if measured == (shape, (1, config.tokens, config.dim), config.depth):
                return replace(config, labels=labels)
    raise CheckpointError(
        f"{where} fits no published shape; put its config.json beside it, or name one with "
        f"--variant ({', '.join(VARIANTS)})"
    )
