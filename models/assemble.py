"""Put a file's tensors into the model: every key used, none missing, every shape right."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msn_export.errors import CheckpointError
from msn_export.models.keys import rename
from msn_export.models.variants import VARIANTS, VitConfig
from msn_export.models.vit_msn import VitMsn

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
            finite.
    """
    known, unread, unknown = rename(tensors)
    with torch.device("meta"):
        model = VitMsn(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _require_keys(shapes, known, unknown, tensors, where)
    notes = _notes(unread, tensors)
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for name in sorted(shapes):
        tensor = _take(name, known, tensors)
        # NaN and infinity reach the sum, which is far cheaper than asking each number
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{where}: weight {known.get(name, name)!r} has NaN or infinity")
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
    return found.detach().to(torch.float32).contiguous()


def _require_keys(
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, str],
    unknown: list[str],
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if ".attn.qkv." in name and name not in known:
            for part in _QKV:
                wanted[name.replace("attn.qkv.", part)] = (shape[0] // 3, *shape[1:])
        else:
            wanted[name] = shape
    missing = [name for name in wanted if name not in known]
    unexpected = unknown + [key for name, key in known.items() if name not in wanted]
    odd = [
        f"{key} is {list(tensors[key].shape)}, expected {list(wanted[name])}"
        for name, key in known.items()
        if name in wanted and tuple(tensors[key].shape) != wanted[name]
    ]
    if missing or unexpected or odd:
        raise CheckpointError(
            f"{where}: {_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}, "
            f"{_some(odd, 'of another shape')}; is the configuration (--variant) right?"
        )


def _some(keys: list[str], what: str) -> str:
    listed = ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")
    return f"{len(keys)} keys {what}" + (f" ({listed})" if keys else "")


def _notes(unread: list[str], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    notes = []
    if unread:
        notes.append(f"not read, as inference does not need it: {_some(unread, 'of pre-training')}")
    kinds = {str(tensors[key].dtype).removeprefix("torch.") for key in tensors}
    converted = sorted(kinds - {"float32", "int64"})
    if converted:
        notes.append(f"weights were {', '.join(converted)}, read as float32")
    return tuple(notes)


def config_of(tensors: Mapping[str, Tensor], variant: str | None, where: str) -> VitConfig:
    """Find the shape of weights that come without a config.json.

    Raises:
        CheckpointError: ``variant`` is unknown, or no published shape or several fit.
    """
    known, _, _ = rename(tensors)
    head = known.get("classifier.weight")
    labels = tuple(f"LABEL_{i}" for i in range(len(tensors[head]))) if head else ()
    if variant is not None:
        return _labelled(named_variant(variant), labels)
    patch, position = (known.get(name) for name in ("patch.weight", "pos_embed"))
    if patch is not None and position is not None:
        blocks = {name.split(".")[1] for name in known if name.startswith("blocks.")}
        measured = (tuple(tensors[patch].shape), tuple(tensors[position].shape), len(blocks))
        for config in VARIANTS.values():
            shape = (config.dim, config.channels, *config.patch_size)
            if measured == (shape, (1, config.tokens, config.dim), config.depth):
                return _labelled(config, labels)
    raise CheckpointError(
        f"{where} fits no published shape; put its config.json beside it, or name one with "
        f"--variant ({', '.join(VARIANTS)})"
    )


def named_variant(name: str) -> VitConfig:
    """Look a published shape up.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in VARIANTS:
        raise CheckpointError(f"variant {name!r} is unknown; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def _labelled(config: VitConfig, labels: tuple[str, ...]) -> VitConfig:
    return replace(config, labels=labels)
