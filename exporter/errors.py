"""Every error a user can meet; ``str(error)`` is one line: what, where, expected, what to do."""

import re

# What a terminal obeys or what turns text around: names in files are hostile. As JSON escapes them.
_OBEYED = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"), *range(0x7F, 0xA0),
    0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A),
)  # fmt: skip
ESCAPES = {code: f"\\u{code:04x}" for code in _OBEYED}
# Of a name that is not UTF-8 Python makes surrogates, which cannot be written anywhere
IN_A_TEXT = ESCAPES | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_IN_A_LINE = IN_A_TEXT | {ord("\n"): "\\n", ord("\t"): "\\t"}
_LONGEST = 2000  # characters; a path or a label of a file may be of any length


def one_line(error: Exception | str) -> str:
    """Give a library's message as a part of one of ours: one line, 300 characters at most."""
    return " ".join(str(error).split())[:300]


# As the C library, the loader of libraries, C++, PyTorch, onnxruntime and Python say it
_OUT_OF_MEMORY = re.compile(
    "failed to map segment|allocate memory|bad_?alloc|enough memory|out of memory|"
    "start new thread|pthread_create",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> str | None:
    """Give what an error says of memory, or address space, that did not suffice; None of others.

    Libraries make errors of their own of it, and we of theirs: the causes are looked at too.
    """
    while True:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is not None:
            start, end = max(0, found.start() - 80), found.end() + 80
            return " ".join(found.string[start:end].split())
        if isinstance(error, MemoryError):
            return " ".join(str(error).split())[:200]
        if error.__cause__ is None:
            return None
        error = error.__cause__


class MsnExportError(Exception):
    """The base of all errors this package raises on purpose.

    ``str(error)`` is one line of at most 2,000 characters that can be printed anywhere: names of
    files and of what is in them are part of it. ``args`` has them as they are.
    """

    def __str__(self) -> str:
        text = super().__str__().translate(_IN_A_LINE)
        if len(text) > _LONGEST:  # the end says what to do
            text = f"{text[: _LONGEST // 2]} … {text[3 - _LONGEST // 2 :]}"
        return text


class SpecError(MsnExportError):
    """A value that no command could act on: a batch range out of order, an unknown name."""


class CheckpointError(MsnExportError):
    """A checkpoint that is missing, of another model, incomplete, or not to be trusted."""


class ImageError(MsnExportError):
    """No usable image, or preprocessing that cannot be carried out."""


class GraphError(MsnExportError):
    """An ONNX graph that is not a ViT we understand, or a graph step that cannot be done."""


class FusionError(GraphError):
    """Other than the expected number of attention cores was found."""


class BuildError(MsnExportError):
    """The TensorRT builder refused the graph, or built something other than was asked for."""


class EngineFileError(MsnExportError):
    """A file that is no engine, or one that is damaged."""


class InputError(MsnExportError):
    """Images, logits or another argument of a runner that do not fit the artifact."""


class RunnerError(MsnExportError):
    """An artifact that cannot run here: no GPU, another TensorRT, a provider that is missing."""


class DeviceError(RunnerError):
    """A call of CUDA, TensorRT or onnxruntime that failed while an artifact was run."""


class ToleranceError(MsnExportError):
    """An artifact does not agree with its reference within the gate."""


class ManifestError(MsnExportError):
    """A manifest that is missing, malformed, or does not belong to its artifact."""


class OutputError(MsnExportError):
    """An output path that exists, cannot be written, or has no room."""


class BenchError(MsnExportError):
    """A contender of a benchmark that cannot be opened, or that failed while it ran."""


class ClusterError(MsnExportError):
    """A Ray cluster that cannot be reached, has no room, or lost what it was doing."""


class MissingPackageError(MsnExportError):
    """A package that this command needs is not installed; the message has the line that does."""
