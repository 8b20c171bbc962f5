"""Read weights files. They are hostile input: no pickle runs code, no index leaves its folder."""

import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msn_export.errors import CheckpointError
from msn_export.models.config import read_json
from msn_export.models.named import INDEX, SINGLE
from msn_export.models.state_dict import Weights, unwrap

# How torch's unpickler names what it will not import or call
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _Arguments:
    """Stands for ``argparse.Namespace`` in a pickle: nothing of it is called, its content dropped.

    Training scripts save their options beside the weights (MAE, DeiT, timm).
    """

    def __setstate__(self, _state: object) -> None: ...


def read_folder(folder: Path, choice: str | None = None) -> Weights:
    """Read a Hugging Face folder's weights: safetensors before .bin, whole or sharded.

    Args:
        folder: where they lie.
        choice: the container or prefix of the weights to take, as ``unwrap`` takes it.
    """
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
    """Read a .safetensors, .bin, .pth or .pth.tar file.

    Args:
        path: the file.
        choice: the container or prefix of the weights to take, as ``unwrap`` takes it.
    """
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
        with warnings.catch_warnings(), _allowed():
            warnings.simplefilter("ignore")  # of torch, about how other files were once written
            # mapped, so that an optimiser's state in the file is never read; old formats cannot be
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
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


def _allowed() -> AbstractContextManager[Any]:
    """Let torch's unpickler make our stand-in where a pickle names ``argparse.Namespace``."""
    return torch.serialization.safe_globals([(_Arguments, "argparse.Namespace")])


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


def _is_zip(path: Path) -> bool:
    """Whether torch.save wrote the format it has had since 1.6, which begins with a zip entry."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _line(error: Exception) -> str:
    # torch puts advice before the reason: to read the file without protection
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return " ".join(text.splitlines()[0].split())[:160] if text else type(error).__name__
