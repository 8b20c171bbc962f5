"""Find a checkpoint wherever a user keeps it, and load it as the reference model.

Importing this loads the standard library alone: a name is checked before torch is loaded.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msn_export.errors import CheckpointError
from msn_export.models.config import (
    INDEX,
    SINGLE,
    Processor,
    VitConfig,
    family_of,
    named_variant,
    parse_config,
    read_json,
    read_labels,
    read_processor,
)

if TYPE_CHECKING:
    from torch import Tensor

    from msn_export.models.state_dict import Shaped
    from msn_export.models.vit import VitMsn
    from msn_export.models.weights import Weights

Kind = Literal["random", "memory", "file", "folder", "hub"]


@dataclass(frozen=True, slots=True)
class Choices:
    """Options of a checkpoint that does not say them itself, or holds several models.

    ``variant`` is the published shape of a weights file, ``weights`` what holds the weights to take
    of several in one file, ``labels`` a file with the names of the classes.
    """

    variant: str | None = None
    weights: str | None = None
    labels: Path | None = None

    def __bool__(self) -> bool:
        return any(given is not None for given in (self.variant, self.weights, self.labels))


AS_IT_SAYS = Choices()  # nothing chosen


WEIGHTS = (".safetensors", ".bin", ".pth", ".tar", ".pt", ".ckpt")
BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json")
ADAPTER = "adapter_config.json"
_LISTED = 1000  # names of a folder that are looked at


@dataclass(frozen=True, slots=True)
class ForeignFolder:
    """A folder that is no model: ``sign`` is a file in it, ``what`` it is and what to do."""

    sign: str
    what: str


# Told whatever else there is: transformers would load the base model and the adapter
ADAPTER_FOLDER = ForeignFolder(
    ADAPTER,
    "is a PEFT adapter, not a whole model; load it with peft, call merge_and_unload(), then "
    "save_pretrained(), and give that folder",
)
# Told in this order where a folder has no config.json or no weights
FOREIGN_FOLDERS = (
    ForeignFolder(
        "zero_to_fp32.py",
        "is a DeepSpeed ZeRO checkpoint in parts; run its zero_to_fp32.py, give what that writes",
    ),
    ForeignFolder(
        "*.distcp",  # of FullyShardedDataParallel too
        "is a checkpoint of torch.distributed in parts; convert it with python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch and give the file",
    ),
    ForeignFolder("*.onnx", "holds exported graphs, not a checkpoint; give the .onnx file to trt"),
    ForeignFolder(
        "tf_model.h5",
        "holds TensorFlow weights; load them with from_pretrained(from_tf=True) of transformers "
        "before 5, save_pretrained, and give that folder",
    ),
    ForeignFolder(
        "flax_model.msgpack",
        "holds Flax weights; load them with from_pretrained(from_flax=True) of transformers before "
        "5, save_pretrained, and give that folder",
    ),
)
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(?:@[\w./-]{1,128})?", re.ASCII)


MEMORY = "memory:"
_models: dict[str, Any] = {}  # by the names of those that ``in_memory`` holds


@contextmanager
def in_memory(model: Any) -> Iterator[str]:
    """Name a model in memory as a checkpoint, for as long as the context is open.

    Args:
        model: transformers' ViTMSNModel or ViTMSNForImageClassification, or a ``VitMsn``.
    """
    name = f"{MEMORY}{type(model).__name__}"
    while name in _models:
        name += "+"
    _models[name] = model
    try:
        yield name
    finally:
        del _models[name]


def model_in_memory(source: str) -> Any:
    if source not in _models:
        raise CheckpointError(
            f"checkpoint {source!r} was a model in memory; give a checkpoint that was saved of it"
        )
    return _models[source]


def kind_of(source: str, variant: str | None = None) -> Kind:
    """Classify what a user named, and refuse what could not be loaded whatever is in it."""
    kind = _kind_of(source)
    if variant is not None and kind != "file":
        raise CheckpointError(
            f"checkpoint {source!r} says its own shape; --variant is for a weights file"
        )
    if kind == "folder":
        require_model(Path(source), source)
    if kind == "random":
        variant, _ = seeded(source)
    if variant is not None:
        named_variant(variant)
    return kind


def require_there(source: str) -> None:
    """Refuse a path of a checkpoint or an artifact that is not there."""
    if os.path.lexists(source):
        return
    if source.endswith((".onnx", ".engine", ".json")):
        raise CheckpointError(f"{source!r} does not exist{near(source)}")
    _kind_of(source)


def require_model(folder: Path, source: str) -> None:
    """Require that a folder, which a user called ``source``, holds a whole model by its files."""
    where = f"checkpoint {source if source.isprintable() else ascii(source)}"
    if not _is_text(source):
        raise CheckpointError(f"{where}: its path is not UTF-8; rename it")
    weights = [name for name in (*SINGLE, *INDEX) if (folder / name).is_file()]
    if (folder / ADAPTER).is_file():
        raise CheckpointError(f"{where} {_adapter(folder, whole=bool(weights))}")
    configured = (folder / "config.json").is_file()
    if configured and weights:
        return
    names = _names(folder)
    for foreign in FOREIGN_FOLDERS:
        if any(Path(name).match(foreign.sign) for name in names):
            raise CheckpointError(f"{where} {foreign.what}")
    if weights:
        raise CheckpointError(
            f"{where} has weights and no config.json; put that beside them, or give the file "
            f"{folder / weights[0]}"
        )
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    inner = sorted(inner, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
    if inner:
        raise CheckpointError(
            f"{where} is no model but holds {', '.join(inner[-3:])}; did you mean "
            f"{folder / (_best(folder, inner) or inner[-1])}?"
        )
    files = [name for name in names if name.endswith(WEIGHTS)]
    if files and not configured:
        raise CheckpointError(
            f"{where} is no Hugging Face model folder; give one of its files, as in "
            f"{folder / files[-1]}"
        )
    if configured:
        raise CheckpointError(
            f"{where} holds no weights; expected one of {', '.join((*SINGLE, *INDEX))}"
        )
    raise CheckpointError(
        f"{where} has no config.json and no weights; expected a Hugging Face model folder"
    )


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes of a disk that are no UTF-8, as Python reads them
        return False
    return True


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in itertools.islice(folder.iterdir(), _LISTED))
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error.strerror}") from error


def _adapter(folder: Path, *, whole: bool) -> str:
    about = read_json(folder / ADAPTER)
    kind, base = about.get("peft_type"), about.get("base_model_name_or_path")
    named = f"PEFT adapter ({kind})" if isinstance(kind, str) else "PEFT adapter"
    of = f" of {base!r}" if isinstance(base, str) and base else ""
    also = f"; if its weights are merged already, remove {ADAPTER}" if whole else ""
    return f"{ADAPTER_FOLDER.what.replace('PEFT adapter', f'{named}{of}', 1)}{also}"


def _best(folder: Path, inner: list[str]) -> str | None:
    """Read which of a Trainer's checkpoints it found best."""
    state = folder / inner[-1] / "trainer_state.json"
    best = read_json(state).get("best_model_checkpoint") if state.is_file() else None
    name = Path(best).name if isinstance(best, str) else None
    return name if name in inner else None


def near(source: str) -> str:
    """Suggest what lies here under a similar name, as the end of an error; '' for nothing."""
    path, found = Path(source), Path()
    for part in path.parts:
        if (found / part).exists():
            found /= part
            continue
        close = difflib.get_close_matches(part, _names(found) if found.is_dir() else [], 1)
        if not close:
            return ""
        found /= close[0]
    return f"; did you mean {found}?" if path.parts else ""


def files_of(source: str) -> list[Path]:
    """List the files of a checkpoint that lies here, as far as loading it may read them."""
    path = Path(source)
    if path.is_dir():
        wanted = (*WEIGHTS, ".index.json", *BESIDE)
        return [file for file in path.iterdir() if file.name.endswith(wanted)]
    return [path, *(path.parent / name for name in BESIDE)] if path.is_file() else []


def seeded(source: str) -> tuple[str, int]:
    parts = source.split(":")
    if len(parts) not in {2, 3} or (len(parts) == 3 and not re.fullmatch(r"\d{1,9}", parts[2])):
        raise CheckpointError(f"checkpoint {source!r} is malformed; expected random:VARIANT[:SEED]")
    return parts[1], int(parts[2]) if len(parts) == 3 else 0


def _kind_of(source: str) -> Kind:
    if source.startswith("random:"):
        return "random"
    if source.startswith(MEMORY):
        model_in_memory(source)
        return "memory"
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
        folder = Path(source).parent
        if "@" in source or not folder.is_dir():
            return "hub"
        raise CheckpointError(
            f"checkpoint {source!r} does not exist in the folder {folder}; if you mean the hub's, "
            f"give {source}@main{near(source)}"
        )
    raise CheckpointError(
        f"checkpoint {source!r} does not exist; expected a folder, a weights file "
        f"({', '.join(WEIGHTS)}), a hub id such as facebook/vit-msn-small, or random:VARIANT"
        f"{near(source)}"
    )


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


def load_checkpoint(source: str, choices: Choices = AS_IT_SAYS) -> Checkpoint:
    """Load a hub id, a Hugging Face folder, a weights file, or ``random:VARIANT[:SEED]``.

    Args:
        source: what the user gave; a hub id may end in ``@revision``.
        choices: what it does not say, or holds several of. A variant wins over a config.json
            beside the file, labels over its ``id2label``.

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
            name, _, revision = source.partition("@")
            folder = _download(name, revision or None)
            return _from_folder(folder, f"{name}@{folder.name}", choices)


def _from_folder(folder: Path, source: str, choices: Choices) -> Checkpoint:
    from msn_export.models.weights import read_folder

    require_model(folder, source)
    beside = folder / "config.json"
    config = read_json(beside)
    parse_config(config, str(beside))  # before gigabytes are read
    weights = read_folder(folder, choices.weights)
    shaped = _shaped(weights.tensors, config, str(beside), source, choices)
    return _load(weights, shaped, source, read_processor(folder))


def _from_memory(source: str, choices: Choices) -> Checkpoint:
    """Copy a model: what is exported does not change where training goes on."""
    from msn_export.models.state_dict import Shaped, classes_of
    from msn_export.models.vit import VitMsn
    from msn_export.models.weights import unwrap

    model = model_in_memory(source)
    for wrapper in ("_orig_mod", "module"):  # of torch.compile, of DataParallel
        model = getattr(model, wrapper, model)
    where = f"checkpoint {source}"
    if choices.weights is not None:
        raise CheckpointError(f"checkpoint {source!r} is one model: it has no --weights to choose")
    tensors = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    if isinstance(model, VitMsn):
        labels = model.config.labels
        if choices.labels is not None:
            labels = read_labels(choices.labels, classes_of(tensors, where))
        shaped = Shaped(replace(model.config, labels=labels), "")
    elif hasattr(getattr(model, "config", None), "to_dict"):
        shaped = _shaped(tensors, model.config.to_dict(), source, source, choices)
    else:
        raise CheckpointError(
            f"checkpoint {source!r} has no configuration; expected a model of transformers, "
            "or save it and give the file"
        )
    shaped = replace(shaped, origin="its own configuration")
    return _load(unwrap(tensors, where), shaped, source, None)


def _from_file(path: Path, choices: Choices) -> Checkpoint:
    from msn_export.models.state_dict import config_of
    from msn_export.models.weights import read_file

    beside = path.parent / "config.json"
    weights = read_file(path, choices.weights)
    if choices.variant is None and beside.is_file():
        shaped = _shaped(weights.tensors, read_json(beside), str(beside), str(path), choices)
    else:
        shaped = config_of(weights.tensors, choices.variant, f"checkpoint {path}")
        if choices.labels is not None:
            labels = read_labels(choices.labels, len(shaped.config.labels))
            shaped = replace(shaped, config=replace(shaped.config, labels=labels))
    return _load(weights, shaped, str(path), read_processor(path.parent))


def _shaped(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    where: str,
    source: str,
    choices: Choices,
) -> Shaped:
    """Read the shape off transformers' configuration, which is called ``where`` in errors."""
    from msn_export.models.state_dict import Shaped, classes_of

    classes = classes_of(tensors, f"checkpoint {source}")
    labels = read_labels(choices.labels, classes) if choices.labels is not None else None
    family = family_of(config, where)
    notes = (family.note,) if family.note else ()
    return Shaped(parse_config(config, where, classes, labels), where, notes, family)


def _load(weights: Weights, shaped: Shaped, source: str, processor: Processor | None) -> Checkpoint:
    from msn_export.models.state_dict import assemble

    where = f"checkpoint {source}"
    assembled = assemble(weights.tensors, shaped.config, where, shaped.origin, shaped.family)
    notes = (*weights.notes, *shaped.notes, *assembled.notes)
    return Checkpoint(
        source, assembled.sha256, assembled.model.config, assembled.model, processor, notes
    )


def _random(source: str) -> Checkpoint:
    from msn_export.models.state_dict import assemble, draw

    variant, seed = seeded(source)
    config = named_variant(variant)
    where = f"random:{variant}:{seed}"
    assembled = assemble(draw(config, seed), config, where, variant)
    note = f"seeded random weights (seed {seed}), not a trained model"
    return Checkpoint(
        where, assembled.sha256, config, assembled.model, None, (*assembled.notes, note)
    )


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
