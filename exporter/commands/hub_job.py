"""The options of ``msn-export hub``. They load no torch, so that a mistake is reported at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msn_export import options
from msn_export.commands.jobs import TARGETS
from msn_export.errors import OutputError, SpecError
from msn_export.files import same_file
from msn_export.hub_folder import CARD, CONFIG, GRAPHS
from msn_export.manifest import manifest_path
from msn_export.models.checkpoint import Choices, kind_of
from msn_export.models.config import PREPROCESSOR
from msn_export.options import Opt
from msn_export.processor_config import require_choice
from msn_export.schema import Job
from msn_export.spec import Dtype, InputFormat, Target

FILES = frozenset({
    CONFIG, PREPROCESSOR, CARD,
    *GRAPHS.values(), *(str(manifest_path(Path(name))) for name in GRAPHS.values()),
})  # fmt: skip
# huggingface_hub utils/_validators.py: OWNER/NAME of letters, digits, - _ . and no two in a row
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def _dtypes(text: str) -> tuple[Dtype, ...]:
    names = options.names(text)
    unknown = [name for name in names if name not in GRAPHS]
    if unknown or not names:
        wrong = unknown[0] if unknown else text
        raise SpecError(f"{wrong!r} is none of {', '.join(GRAPHS)}")
    return tuple(dtype for dtype in GRAPHS if dtype in names)


@dataclass(frozen=True, slots=True)
class HubJob(Job):
    """Options of ``msn-export hub``.

    ``checkpoint`` may be an .onnx file with its manifest. ``dtypes`` () are fp32, fp16, and int8
    where there are pictures to quantise with.
    """

    checkpoint: str
    output: Path
    dtypes: Annotated[
        tuple[Dtype, ...],
        Opt(
            "Graphs to write. Default: fp32,fp16 and, with --images, int8.",
            "--dtype",
            read=_dtypes,
            form="fp32,fp16,int8",
        ),
    ] = ()
    images: Annotated[
        Path | None, Opt("Pictures to check on, and to quantise with.", exists=True)
    ] = None
    target: Annotated[
        Target, Opt("Form of attention and opset, as of 'msn-export onnx'.", words=TARGETS)
    ] = Target.PORTABLE
    input_format: Annotated[
        InputFormat, Opt("float; no client feeds uint8.", "--input", words=("float", "uint8"))
    ] = InputFormat.FLOAT
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    preprocess: Annotated[
        str,
        options.preprocess("How its pictures are made. Default: as its own file says, else hf."),
    ] = "auto"
    push: Annotated[
        str | None, Opt("Upload the folder to this repository of the hub.", metavar="REPO_ID")
    ] = None
    private: Annotated[bool, Opt("Make the repository private, if it is a new one.")] = False
    force: options.Force = False
    command: str = ""

    @property
    def written(self) -> tuple[Dtype, ...]:
        """The graphs to write."""
        if self.dtypes:
            return self.dtypes
        return tuple(d for d in GRAPHS if d is not Dtype.INT8 or self.images is not None)

    @property
    def choices(self) -> Choices:
        """Choices for a checkpoint that does not make them itself, or holds several."""
        return Choices(self.variant, self.weights, self.labels)

    @property
    def is_graph(self) -> bool:
        """True where an .onnx file is given, and not a checkpoint."""
        return self.checkpoint.endswith(".onnx")

    def require_consistent(self) -> None:
        if self.input_format is not InputFormat.FLOAT:
            raise SpecError(
                f"--input {self.input_format}: transformers.js and optimum feed normalised floats; "
                "leave it out, or export a graph for your own runtime with msn-export onnx"
            )
        strange = [dtype for dtype in self.dtypes if dtype not in GRAPHS]
        if strange:
            raise SpecError(f"HubJob.dtypes has {strange[0]}; expected {', '.join(GRAPHS)}")
        if Dtype.INT8 in self.dtypes and self.images is None:
            raise SpecError(
                "--dtype int8 takes ranges on pictures like those to come; give --images too, or "
                "leave int8 out"
            )
        if self.is_graph and (self.choices or self.preprocess != "auto"):
            raise SpecError(
                f"{self.checkpoint} says its weights, labels and preprocessing itself; leave "
                "--variant, --weights, --labels and --preprocess out, or give its checkpoint"
            )
        if self.push is not None and not is_repository(self.push):
            raise SpecError(f"--push {self.push!r} is no repository id; expected OWNER/NAME")
        if self.private and self.push is None:
            raise SpecError("--private is for a repository; give --push REPO_ID too")

    def validate_paths(self) -> Path:
        """Refuse, before any work is done, what could not be read, or put in place after it.

        Returns:
            The path of the folder to write.
        """
        if not self.is_graph:
            kind_of(self.checkpoint, self.variant)
        require_choice(self.preprocess)
        require_free(self.output, Path(self.checkpoint), force=self.force)
        return self.output


def is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not re.search(r"--|\.\.|[-.](/|$)", name)


def require_free(output: Path, source: Path, *, force: bool) -> None:
    """Refuse a folder that could not be put in place, or holds what is not of such a folder.

    ``force`` lets a folder be replaced that holds nothing else, but none that ``source`` is in.
    """
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"output folder {folder} does not exist; create it or choose another -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {folder} is not writable; choose another with -o")
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise OutputError(f"output {output} is no folder; choose another with -o")
    if any(same_file(output, one) for one in (source, *source.absolute().parents)):
        raise OutputError(f"output {output} is, or holds, what is read; choose another with -o")
    if not force:
        raise OutputError(f"output {output} exists; --force replaces it, -o writes elsewhere")
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if name not in {*FILES, "onnx"}:
            raise OutputError(
                f"output {output} holds {name}, which msn-export hub does not write; move it away, "
                "or choose another -o"
            )
