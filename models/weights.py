"""Read weights files, and take off what training wrote around the weights.

Files are hostile input: no pickle runs code, no index leaves its folder.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.config import INDEX, SINGLE, counted, read_json
from msn_export.models.state_dict import canonical, is_weight


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights without wrappers, and what a user should know of the choice."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


# How torch's unpickler names what it will not import or call
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _Arguments:
    """Stands for ``argparse.Namespace`` in a pickle: nothing of it is called, its content dropped.

    Training scripts save their options beside the weights (MAE, DeiT, timm).
    """

    def __setstate__(self, _state: object) -> None: ...


def read_folder(folder: Path, choice: str | None = None) -> Weights:
    """Read a Hugging Face folder's weights: safetensors before .bin, whole or sharded."""
    for single, index in zip(SINGLE, INDEX, strict=True):
        if (folder / single).is_file():
            return read_file(folder / single, choice)
        if (folder / index).is_file():
            return unwrap(_read_shards(folder, index), str(folder), choice)
    raise CheckpointError(
        f"{folder} holds no weights; expected one of {', '.join((*SINGLE, *INDEX))}"
    )


def _read_shards(folder: Path, index: str) -> dict[str, Tensor]:
    listed = read_json(folder / index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / index} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(shard) for shard in listed.values()}):
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"{folder / index} points outside its folder: {name!r}; refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}, a shard of the weights, is missing")
        for key, tensor in _read_shard(folder / name).items():
            if key in tensors:
                raise CheckpointError(f"{folder}: weight {key!r} is in two shards")
            tensors[key] = tensor
    return tensors


def _read_shard(path: Path) -> dict[str, Tensor]:
    read = _read(path)
    if not isinstance(read, Mapping) or not all(isinstance(t, Tensor) for t in read.values()):
        raise CheckpointError(f"{path}, a shard of the weights, is no state dict")
    tensors = {str(key): tensor for key, tensor in read.items()}
    _require_held(tensors, path)
    return tensors


def read_file(path: Path, choice: str | None = None) -> Weights:
    """Read a .safetensors, .bin, .pth or .pth.tar file; ``choice`` is as ``unwrap`` takes it."""
    weights = unwrap(_read(path), str(path), choice)
    _require_held(weights.tensors, path)
    return weights


def _read(path: Path) -> Any:
    return (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_line(error)}); download it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    _require_stored(path)
    try:
        # a stand-in of ours is made where a pickle names ``argparse.Namespace``
        allowed = torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")])
        with warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")  # of torch, about how other files were once written
            # mapped, so that an optimiser's state in the file is never read; old formats cannot be
            # an archive, as torch.save writes since 1.6, begins with a zip entry
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch's unpickler raises what it likes for a damaged file
        refused = _GLOBAL.search(str(error))
        if refused is not None:
            raise CheckpointError(
                f"{path} is refused: it names {refused[1]}, and a pickle can execute code; "
                "convert it to safetensors where you trust it"
            ) from error
        raise CheckpointError(
            f"{path} is not a whole weights file ({_line(error)}); expected what torch.save or "
            "safetensors wrote"
        ) from error


def _require_stored(path: Path) -> None:
    """Refuse a file that was packed again: mapped, compressed bytes would be read as weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # another format, or damaged: torch says which
    if packed:
        raise CheckpointError(
            f"{path}: {packed[0].filename!r} in it is compressed, so it was packed again after "
            "torch.save; unpack it and pack it without compression (zip -0), or save it again"
        )


def _require_held(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are larger than their file: views of a few numbers fill any memory."""
    plain = [t for t in tensors.values() if t.layout is torch.strided and t.device.type == "cpu"]
    claimed = sum(math.prod(t.shape) * t.element_size() for t in plain if not t.is_nested)
    held = path.stat().st_size
    if claimed > 2 * held:
        raise CheckpointError(
            f"{path} has {held} bytes and weights of {claimed}, which repeat what is in it; "
            "refused, save it again with contiguous weights"
        )


def _line(error: Exception) -> str:
    # torch puts advice before the reason: to read the file without protection
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return " ".join(text.splitlines()[0].split())[:160] if text else type(error).__name__


# Where a file keeps weights beside an optimiser's state, best first, and who writes it so.
CONTAINERS = {
    "target_encoder": "facebookresearch/msn: the averaged encoder, which its evaluation reads",
    "teacher": "self-distillation: the averaged network",
    "state_dict": "PyTorch Lightning, timm's training script",
    "model_state_dict": "PyTorch's tutorials",
    "model": "the MAE and DeiT code bases",
    "module": "DeepSpeed (mp_rank_00_model_states.pt)",
    "encoder": "facebookresearch/msn: the encoder that gradients train",
    "student": "self-distillation: the network that gradients train",
    "model_ema": "DeiT: an exponential moving average",
    "state_dict_ema": "timm's training script: an exponential moving average",
}
# What a wrapping module puts before every key, best first, and which it is.
PREFIXES = {
    "module": "DataParallel, DistributedDataParallel, AveragedModel, facebookresearch/msn",
    "_orig_mod": "torch.compile",
    "_forward_module": "Lightning Fabric",
    "base_model": "PEFT after merging",
    "model": "a LightningModule with a field model",
    "target_encoder": "a training script of MSN",
    "teacher": "self-distillation: the averaged network",
    "backbone": "lightly: the averaged encoder",
    "student": "self-distillation: the network that gradients train",
    "anchor_backbone": "lightly: the encoder that gradients train",
}
# What stands within keys where a part of the model was wrapped.
INSIDE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
# The head of facebookresearch/mae main_linprobe.py: BatchNorm without weights, then a linear layer.
PROBE = {"head.0.running_mean", "head.0.running_var", "head.1.weight", "head.1.bias"}
_PROBE_EPS = 1e-6  # main_linprobe.py, BatchNorm1d(affine=False, eps=1e-6)
_DEEPEST = 8  # containers within one another; the deepest known are DeepSpeed's within Lightning's
_RANK = {name: rank for rank, name in enumerate((*PREFIXES, *INSIDE))}
_LINEAR_EVAL = ("target_encoder", "encoder")  # beside which facebookresearch/msn has a classifier

Prefix = tuple[str, ...]


def unwrap(loaded: Any, where: str, choice: str | None = None) -> Weights:
    """Take containers and prefixes off what a file holds.

    Args:
        loaded: what torch or safetensors read.
        where: what to call the file in errors.
        choice: the container or prefix to take where there are several.
    """
    taken: list[str] = []
    beside: list[str] = []
    parent: Any = None
    held = loaded
    chosen = choice is None
    for _ in range(_DEEPEST):
        if not isinstance(held, Mapping):
            break
        names = [name for name in CONTAINERS if _holds(held.get(name))]
        if not chosen and _holds(held.get(choice)):
            name, chosen = str(choice), True
        elif names:
            name = names[0]
        else:
            break
        beside += [other for other in (*names, *_unlisted(held)) if other != name]
        taken.append(name)
        parent, held = held, held[name]
    state = _state_dict(held, where)
    wanted = None if chosen else (str(choice), [*taken, *beside])
    tensors, prefix, others, outside = _without_prefix(state, where, wanted)
    if taken and taken[-1] in _LINEAR_EVAL and _holds(parent.get("classifier")):
        head = _state_dict(parent["classifier"], where)
        tensors |= {f"classifier.{_split(key)[1]}": tensor for key, tensor in head.items()}
    steps = [*(f"{name!r}" for name in taken), *(f"'{name}.'" for name in prefix)]
    beside += [".".join(other) for other in others]
    notes = []
    if steps or beside:
        also = ""
        if beside:
            listed = ", ".join(map(repr, beside))
            also = f"; the file also has {listed} (--weights {beside[0].rpartition('.')[2]})"
        source = " > ".join(steps) if steps else "the keys without a prefix"
        notes.append(f"weights read from {source}{also}")
    if outside:
        notes.append(_left(outside, prefix))
    if _is_probe(tensors):
        _fold(tensors)
        notes.append("the BatchNorm of MAE's linear probe is folded into its classifier")
    return Weights(tensors, tuple(notes))


def _unlisted(held: Mapping[Any, Any]) -> list[str]:
    """Name the dictionaries of no row of CONTAINERS that hold a model."""
    return [
        name
        for name, value in held.items()
        if name not in CONTAINERS and _holds(value) and any(map(_ends_in_cls, value))
    ]


def _ends_in_cls(key: Any) -> bool:
    return isinstance(key, str) and key.endswith(("cls_token", "class_token"))


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _state_dict(held: Any, where: str) -> dict[str, Tensor]:
    if not _holds(held):
        raise CheckpointError(f"{where} holds no weights by name; expected a state dict")
    odd = [key for key, value in held.items() if not isinstance(value, Tensor) or value.is_nested]
    if odd:
        inner = [key for key in odd if _holds(held[key])]
        hint = f" (--weights KEY takes one of {', '.join(map(repr, inner[:5]))})" if inner else ""
        raise CheckpointError(
            f"{where} holds {odd[0]!r}, which is no weight; expected a state dict, or one under "
            f"{', '.join(CONTAINERS)}{hint}"
        )
    return {str(key): tensor for key, tensor in held.items()}


def _without_prefix(
    state: dict[str, Tensor], where: str, choice: tuple[str, list[str]] | None
) -> tuple[dict[str, Tensor], Prefix, list[Prefix], list[str]]:
    """Take the prefix off the keys of one model.

    Args:
        state: a flat state dict.
        where: what to call the file in errors.
        choice: the prefix to take, and the file's containers, for the error.

    Returns:
        Its weights, the prefix, the prefixes of other whole models, and the keys left outside.
    """
    groups: dict[Prefix, dict[str, str]] = {}
    fields = _fields(state)
    for key in state:
        prefix, rest = _split(key, fields)
        group = groups.setdefault(prefix, {})
        if rest in group:
            raise CheckpointError(f"{where}: keys {group[rest]!r} and {key!r} are the same weight")
        group[rest] = key
    sizes = {prefix: sum(_of_encoder(rest) for rest in group) for prefix, group in groups.items()}
    whole = [prefix for prefix, size in sizes.items() if 2 * size > max(sizes.values())]
    whole.sort(key=lambda prefix: [_RANK.get(name, len(_RANK)) for name in prefix])
    if choice is not None:
        asked = [prefix for prefix in whole if choice[0] in prefix]
        if not asked:
            names = [*choice[1], *(name for prefix in whole for name in prefix)]
            has = f"it has {', '.join(dict.fromkeys(names))}" if names else "it has one model alone"
            raise CheckpointError(f"{where} has no weights under {choice[0]!r} (--weights); {has}")
    else:
        asked = whole
    if not asked:  # nothing here is of a ViT-MSN: whoever assembles it says so
        return state, (), [], []
    chosen = asked[0]
    if len(asked) > 1 and not fields.isdisjoint(chosen):
        listed = ", ".join(repr(".".join(prefix)) for prefix in asked)
        raise CheckpointError(
            f"{where} holds several models, under {listed}; choose one with --weights "
            f"{next(name for name in chosen if name in fields)}"
        )
    others = [prefix for prefix in whole if prefix != chosen]
    tensors = {rest: state[key] for rest, key in groups[chosen].items()}
    left = [
        key
        for prefix, group in groups.items()
        if prefix != chosen and prefix not in others
        for key in group.values()
    ]
    if not chosen:  # nothing wraps the model, so every key has to be one of its own
        return tensors | {key: state[key] for key in left}, chosen, others, []
    return tensors, chosen, others, left


def _is_probe(tensors: Mapping[str, Tensor]) -> bool:
    """Match a whole linear probe, in its shapes; keys of any other are unknown ones."""
    if not tensors.keys() >= PROBE:
        return False
    parts = [tensors[name] for name in PROBE]
    plain = all(t.layout is torch.strided and t.device.type == "cpu" for t in parts)
    rows = tuple(tensors["head.1.weight"].shape)
    if not plain or len(rows) != 2 or not all(t.is_floating_point() for t in parts):
        return False
    sizes = {"head.1.weight": rows, "head.1.bias": rows[:1]}
    return all(tuple(tensors[name].shape) == sizes.get(name, rows[1:]) for name in PROBE)


def _fold(tensors: dict[str, Tensor]) -> None:
    """Write MAE's linear probe as one linear layer ``head``, in place; exact in real arithmetic.

    ``W ((x - mean) / std) + b`` is ``W' x + b'`` with ``W' = W / std`` and ``b' = b - W' mean``.
    """
    parts = {name: tensors.pop(name).double() for name in PROBE}
    tensors.pop("head.0.num_batches_tracked", None)
    weight = parts["head.1.weight"] / (parts["head.0.running_var"] + _PROBE_EPS).sqrt()
    bias = parts["head.1.bias"] - weight @ parts["head.0.running_mean"]
    tensors["head.weight"], tensors["head.bias"] = weight.float(), bias.float()


def _of_encoder(key: str) -> bool:
    name = canonical(key)
    return name is not None and not name.startswith("classifier.")


def _fields(state: Iterable[str]) -> set[str]:
    """Find the names, of no row of PREFIXES, that stand before the [CLS] token of a model."""
    found: set[str] = set()
    for key in filter(_ends_in_cls, state):
        parts = key.split(".")
        tails = (canonical(_joined(parts[first:])) for first in range(len(parts)))
        found.update(parts[: next((i for i, tail in enumerate(tails) if tail is not None), 0)])
    return found - _RANK.keys()


def _split(key: str, fields: Container[str] = ()) -> tuple[Prefix, str]:
    """Part a key into the wrappers before it and the rest, without those within it."""
    parts = key.split(".")
    first = 0
    while first < len(parts) - 1 and (parts[first] in PREFIXES or parts[first] in fields):
        if parts[first] not in INSIDE and is_weight(_joined(parts[first:])):
            break
        first += 1
    return tuple(parts[:first]), _joined(parts[first:])


def _joined(parts: Iterable[str]) -> str:
    return ".".join(part for part in parts if part not in INSIDE)


def _left(keys: list[str], prefix: Prefix) -> str:
    outside = f"outside '{'.'.join(prefix)}.'"
    note = f"not read: {counted(keys, 'key', outside)}"
    heads = [key for key in keys if (canonical(_split(key)[1]) or "").startswith("classifier.")]
    if heads:
        note += f"; what {heads[0]} reads is not known, so it is no classifier of this model"
    return note
