"""Options of jobs: how the command line asks for a field, and the fields that several jobs have.

A field whose annotation holds an ``Opt`` is an option of its command. ``cli/options.py`` makes it
of the field's name, type, bounds and default, and of what the ``Opt`` says besides.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import EnumType
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from msn_export import preprocessing
from msn_export.errors import SpecError
from msn_export.schema import Index, Job, Within, annotated_hints
from msn_export.spec import ImageSize

OUTPUT = "-o --output"
# parts of the help
MODEL, PICTURES, CHECK, RUN, WRITTEN = (
    "The checkpoint", "Pictures", "The check", "Where it runs", "Output",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opt:
    """The part of an option that its field does not state.

    Args:
        help: its line of the help.
        flag: its names, with spaces between them, where the field's name is not the one.
        read: makes the value of text, or of the path; raises SpecError or ValueError.
        form: what ``read`` takes, in a few words.
        words: those of its type's values that may be given; ``none`` is one more, for None.
        elsewhere: words that are refused, each with what to do instead.
        exists: it is a file or a folder that is there.
        metavar: what stands for its value in the help.
        bare: the value where the flag has none behind it.
        each: an option apart for each key, with its help: a flag for each value of the field, or a
            number for each key of a mapping.
        kept: the manifest keeps it, where it is set.
        panel: the part of the help that it stands in.
    """

    help: str | None = None
    flag: str = ""
    read: Callable[[Any], Any] | None = None
    form: str = ""
    words: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    none: str | None = None
    exists: bool = False
    metavar: str | None = None
    bare: str | None = None
    each: Mapping[str, str | None] = field(default_factory=dict)
    kept: bool = False
    panel: str = "Options"


class One(NamedTuple):
    """One value of a field: its type, its bounds, and whether there may be several."""

    kind: Any
    within: Within | None = None
    several: bool = False

    @classmethod
    def of(cls, hint: Any) -> One:
        """Find it in a field's annotation; of a union it is the first."""
        origin, inner = get_origin(hint), get_args(hint)
        if origin is Annotated:
            inside = cls.of(inner[0])
            bounds = (extra for extra in inner[1:] if isinstance(extra, Within))
            return inside._replace(within=next(bounds, inside.within))
        if origin is tuple:
            return cls.of(inner[0])._replace(several=True)
        if origin is Mapping:
            return cls.of(inner[1])
        return cls.of(inner[0]) if origin in {typing.Union, UnionType} else cls(hint)

    @property
    def is_enum(self) -> bool:
        return isinstance(self.kind, EnumType)


def opts_of(job: Any) -> dict[str, Opt]:
    """List a job's options by the names of their fields."""
    return {
        name: extra
        for name, hint in annotated_hints(job).items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Opt)
    }


def value_of(hint: Any, opt: Opt, value: Any) -> Any:
    """Make a field's value of what a caller gives: text or a path where the field holds another.

    Args:
        hint: the field's annotation.
        opt: what the field's option says besides.
        value: text, a path, a number, or several of them; what the field holds stays as it is.
    """
    one = One.of(hint)
    if opt.read is not None and isinstance(value, str) and get_origin(one.kind) is not Literal:
        return opt.read(value)
    if one.several and isinstance(value, str | Iterable):
        values = [value] if isinstance(value, str) else value
        return tuple(value_of(one.kind, Opt(), each) for each in values)
    if one.kind is Path and isinstance(value, str | os.PathLike):
        return Path(value)
    if one.is_enum and isinstance(value, str):
        words = opt.words or tuple(member.value for member in one.kind)
        if value not in words:
            raise SpecError(f"is {value!r}; expected {', '.join(words[:-1])} or {words[-1]}")
        return one.kind(value)
    if hasattr(one.kind, "parse") and isinstance(value, str | int | float):
        return one.kind.parse(str(value))
    return value


def kept(job: Job) -> dict[str, Any]:
    """Give the options that are set and that a manifest is to keep."""
    given = {name: getattr(job, name) for name, opt in opts_of(type(job)).items() if opt.kept}
    # 0 is a level that was chosen
    return {n: value for n, value in given.items() if value is not None and value is not False}


def ending(*endings: str) -> Callable[[Any], Path]:
    """Give what reads the path of a file to write, whose name ends in one of ``endings``."""

    def read(path: str | Path) -> Path:
        if Path(path).suffix not in endings:
            wanted = f"{', '.join(endings[:-1])} or {endings[-1]}" if endings[1:] else endings[0]
            raise SpecError(f"{path} does not end in {wanted}")
        return Path(path)

    return read


PAGE = ending(".html", ".htm")


def preprocess(help: str, *, auto: bool = False) -> Opt:
    """Give the option that takes a preset of preprocessing or a JSON file."""
    return Opt(
        help,
        read=_preprocess,
        form=f"{'auto|' if auto else ''}hf|msn-eval|raw|FILE.json",
        panel=PICTURES,
    )


def _preprocess(text: str) -> str:
    from msn_export.processor_config import require_choice

    require_choice(text)
    return text


def number_or_all(text: str) -> int | None:
    """Read ``N``, or ``all``, which is None."""
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise SpecError(f"{text!r} is no number of pictures; expected 1 or more, or all")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Read words with commas between them."""
    return tuple(filter(None, text.split(",")))


DTYPES = ("fp32", "fp16", "bf16")  # those that are no matter of calibration
EIGHT_BITS = {
    dtype: f"8 bits take ranges: export fp32, and quantise it with msn-export calibrate --{dtype}"
    for dtype in ("int8", "fp8")
}

# how pictures become a model's input
Preprocess = Annotated[
    str | None,
    preprocess("How pictures are made into its input. Default: as its manifest says, else hf."),
]
Exif = Annotated[
    preprocessing.Exif | None,
    Opt(
        "Turn pictures by their EXIF orientation? Default: as the manifest says, else apply.",
        panel=PICTURES,
    ),
]
OpenSize = Annotated[
    ImageSize | None,
    Opt("Pixels, for a graph that leaves height and width open.", panel=PICTURES),
]

# what a checkpoint may not say of itself
Variant = Annotated[
    str | None,
    Opt(
        "Published shape, where a weights file does not say: vit-msn-small, -base, -large, -base-4,"
        " -large-7.",
        metavar="VARIANT",
        panel=MODEL,
    ),
]
Weights = Annotated[
    str | None,
    Opt("Which of several weights in one file, as model_ema.", metavar="KEY", panel=MODEL),
]
Labels = Annotated[Path | None, Opt("Names of the classes: a line each, or JSON.", panel=MODEL)]

# where an artifact runs
Providers = Annotated[
    tuple[str, ...],
    Opt(
        "onnxruntime's, in order: cpu, cuda, tensorrt, … Or openvino. Default: cuda, else cpu.",
        read=names,
        form="NAME,…",
        panel=RUN,
    ),
]
Precision = Annotated[
    str | None,
    Opt(
        "OpenVINO: what an fp32 graph is computed in. Default: fp32.",
        words=("fp32", "bf16"),
        panel=RUN,
    ),
]
Device = Annotated[Index | None, Opt("GPU to run on. Default: 0.", panel=RUN)]
Trust = Annotated[bool, Opt("Run an engine that has no manifest.", panel=RUN)]

# labelled pictures: how often both sides of a comparison are right
LabelledPictures = Annotated[
    Path | None,
    Opt(
        "Labelled pictures, all of them run: a significant loss of accuracy fails. A folder with a"
        " subfolder for each class, or a .csv or .parquet with the columns path and label.",
        exists=True,
        panel=CHECK,
    ),
]
AccuracyDrop = Annotated[
    Annotated[float, Within(0, 1)],
    Opt("--labelled: loss of accuracy that is allowed, as in 0.01.", panel=CHECK),
]

# what is written, and how it is checked
Output = Annotated[
    Path | None,
    Opt(
        "The .onnx file to write. Default: named after what is read.",
        OUTPUT,
        read=ending(".onnx"),
        panel=WRITTEN,
    ),
]
Images = Annotated[
    Path | None,
    Opt("Pictures to check on; without, seeded noise.", exists=True, panel=CHECK),
]
Islands = Annotated[str, Opt("fp16: which tensors stay fp32.", metavar="measured|none|FILE")]
Check = Annotated[bool, Opt("Write without comparing; the manifest says so.", panel=CHECK)]
Force = Annotated[bool, Opt("Replace an existing output.", panel=WRITTEN)]
