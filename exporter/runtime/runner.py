"""The parts that all runners share: preprocessing, labels, selftest, outputs by name, and end."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError, ManifestError, RunnerError
from msn_export.manifest import Described, Manifest
from msn_export.onnx_header import GraphMetadata
from msn_export.runtime import dlpack
from msn_export.runtime.batches import combine
from msn_export.runtime.dlpack import OF_NUMPY, OF_ONNX, TensorType, has
from msn_export.spec import BatchRange, Dtype, InputFormat, Scores, TensorSpec

if TYPE_CHECKING:
    from msn_export.images import Picture
    from msn_export.metrics.metrics import Agreement
    from msn_export.metrics.tolerances import Gate


class Outputs(Mapping[str, Any]):
    """The outputs of one call, as ``outputs["embedding"]`` and as ``outputs.embedding``.

    Each holds one row an image, in the order of the images, and is of the kind that was given:
    NumPy arrays for NumPy arrays, and tensors of the same library on the same device for others.
    An output that is called like a method (``keys``, ``get``) is reached by name only.
    """

    __slots__ = ("_arrays", "_use_on")

    def __init__(self, arrays: dict[str, Any], use_on: Callable[[Any], None] | None = None) -> None:
        self._arrays = arrays
        self._use_on = use_on

    def record_stream(self, stream: Any) -> None:
        """Let a further stream use outputs that lie on the GPU, as torch's ``record_stream``.

        What ``stream`` is given from now on starts after the outputs are written. Their memory is
        not written again before ``stream`` has done what it is given until they are dropped. The
        stream of the call needs no such line, nor do outputs on the host: for them it does nothing.

        Args:
            stream: an object of torch or cupy, or a number. A stream that is known by its number
                alone cannot be asked later, so memory that it used is freed and not used again.

        Raises:
            InputError: it is no stream.
            RunnerError: the outputs are onnxruntime's, which frees them when they are dropped.
        """
        if self._use_on is not None:
            self._use_on(stream)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._arrays[name]
        except KeyError:
            raise KeyError(self._lacks(name)) from None

    def __getattr__(self, name: str) -> Any:
        if name in Outputs.__slots__:  # asked for before __init__: by copy, by pickle
            raise AttributeError(name)
        try:
            return self._arrays[name]
        except KeyError:
            raise AttributeError(self._lacks(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._arrays]

    def __repr__(self) -> str:
        shapes = (f"{name} {list(array.shape)}" for name, array in self._arrays.items())
        return f"Outputs({', '.join(shapes)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Outputs, (self._arrays,)

    def _lacks(self, name: str) -> str:
        return f"there is no output {name!r}; there is {', '.join(self._arrays)}"


class Guess(NamedTuple):
    """One of a classifier's answers; ``number`` is the label's place among the classes.

    ``score`` is what transformers' pipeline calls so, ``probability`` the same where it is one: a
    regression has none.
    """

    label: str
    probability: float | None
    number: int
    score: float


def scores_of(logits: NDArray[Any], scores: Scores | None = None) -> NDArray[np.float64]:
    """Turn logits [b, classes] into scores [b, classes], as transformers' pipeline does.

    ``scores`` is what the manifest says; None decides by the number of classes.
    """
    values = np.asarray(logits, np.float64)
    kind = scores or Scores.of(None, values.shape[1])
    if kind is Scores.RAW:
        return values
    if kind is Scores.SIGMOID:
        return 0.5 + 0.5 * np.tanh(values / 2)  # 1 / (1 + exp(-x)), whatever x is
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def top_k(
    logits: Any, labels: Sequence[str] = (), scores: Scores | None = None, k: int = 5
) -> list[list[Guess]]:
    try:
        values, k = np.asarray(logits, np.float64), operator.index(k)
    except Exception as error:
        raise InputError(
            f"logits are a {type(logits).__name__} and k is {k!r}; expected numbers [b, classes] "
            "on the host, and a whole k"
        ) from error
    named = len(labels)
    if values.ndim != 2 or 0 in values.shape or named not in {0, values.shape[1]} or k < 1:
        wanted = f"[b, {named or 'classes'}]"
        raise InputError(
            f"logits have shape {list(values.shape)} and k is {k}; expected {wanted} and k "
            "of at least 1"
        )
    if not np.isfinite(values).all():
        raise InputError("logits are not all finite; run selftest() to see what is wrong")
    kind = scores or Scores.of(None, values.shape[1])
    scored = scores_of(values, kind)
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]

    def guess(row: NDArray[np.float64], index: int) -> Guess:
        score = float(row[index])
        label = labels[index] if named else str(index)
        return Guess(label, score if kind.are_probabilities else None, index, score)

    return [
        [guess(row, int(index)) for index in order] for row, order in zip(scored, best, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Precision:
    """Precision of a compiled model, read back from it; counts by dtype.

    ``products`` are matrix products and convolutions, ``attention`` fused attention, ``quantised``
    how many products the graph quantises: None where nothing says.
    """

    products: dict[str, int]
    attention: dict[str, int]
    quantised: int | None = None

    def __str__(self) -> str:
        total = sum(self.products.values())
        parts = []
        if self.quantised is not None:
            eight = self.products.get("int8", 0)
            parts.append(f"{eight} of {self.quantised} quantised products in int8")
        parts += [
            f"{count} of {total} products in {dtype}"
            for dtype, count in self.products.items()
            if dtype != "int8" or self.quantised is None
        ]
        parts += [f"{count} attention in {dtype}" for dtype, count in self.attention.items()]
        return ", ".join(parts)


class Runner(Described, ABC):
    """An artifact that is loaded and runs; ``open_runner`` makes one.

    Safe to share between threads. ``name`` says what runs it and on what. ``manifest`` is None
    where there is none, and ``metadata`` then what a graph's own file says. ``inputs`` and
    ``outputs`` are the artifact's tensors, a dynamic batch as a name. ``profiles`` are the batches
    it accepts, ``file`` is what was opened. ``precision`` is what was compiled, None where the
    runtime does not say. ``rounds_as`` is a precision that was asked for, coarser than the
    artifact's own.
    """

    file: Path | None = None
    precision: Precision | None = None
    rounds_as: Dtype | None = None

    def __init__(
        self,
        name: str,
        manifest: Manifest | None,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        profiles: tuple[BatchRange, ...],
        metadata: GraphMetadata | None = None,
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.metadata = metadata
        self.inputs = inputs
        self.outputs = outputs
        self.profiles = profiles
        self._is_open = True

    def __repr__(self) -> str:
        what = self.file or "an artifact"
        taken, given = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        state = "" if self._is_open else "; closed"
        return f"<Runner of {what}: {taken} -> {given}; batch {self.batch}; {self.name}{state}>"

    @property
    def batch(self) -> BatchRange:
        """The batches accepted, all profiles together; others are split or padded."""
        return combine(self.profiles)

    @abstractmethod
    def __call__(self, images: Any, *, stream: Any = None) -> Outputs:
        """Run any number of images.

        A batch above the artifact's largest is split, one below its smallest is padded and the
        padding cut off again; the outputs have one row an image.

        Args:
            images: a NumPy array, or a tensor of a library with DLPack (torch, cupy, jax), on
                the host or on the runner's GPU; of the dtype and shape of ``inputs``. Or pictures,
                one or a list, as paths, bytes, open files or Pillow images: ``preprocess`` makes
                a batch of them.
            stream: for tensors on the GPU, the CUDA stream (a number, or an object of torch,
                cupy or cuda-bindings) on which the images are made and the outputs are used.

        Returns:
            The outputs, of the kind that was given: logits [b, classes], an embedding [b, dim],
            tokens [b, n, dim]; float32, or what ``outputs`` of the runner names.

        Raises:
            InputError: images of another dtype or shape, or a stream without tensors on the GPU.
            ImageError: a picture cannot be read.
            RunnerError: the runner is closed.
            DeviceError: CUDA, TensorRT or the runtime failed.
        """

    def map(self, batches: Iterable[NDArray[Any]]) -> Iterator[Outputs]:
        """Run batch after batch; where the runtime can, some of them at the same time.

        Args:
            batches: as for a call, NumPy arrays. Some are taken before the first outputs come.

        Returns:
            The outputs of each batch, in the order of the batches.
        """
        for images in batches:
            yield self(images)

    @abstractmethod
    def close(self) -> None:
        """Free what the runner holds, after calls under way have ended. Again: does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def preprocess(self, images: Picture | Iterable[Picture]) -> NDArray[Any]:
        """Turn pictures into a batch, as the manifest says, else the graph's own file.

        Args:
            images: one or several: paths, bytes of files, open files, Pillow images, or uint8
                [h, w, 3] in RGB (OpenCV's arrays are BGR: ``array[..., ::-1]``).

        Returns:
            What the artifact takes: float32 [b, c, h, w], normalised, or uint8 [b, h, w, c].

        Raises:
            ImageError: a picture cannot be read (it is named), or there is none.
            ManifestError: nothing says how.
        """
        preprocessing = self.stated.preprocessing if self.stated is not None else None
        if preprocessing is None:
            raise ManifestError(
                "there is no manifest that says how pictures are preprocessed; keep the artifact's "
                ".json beside it, or use msn_export.images"
            )
        from msn_export import images as pictures

        several = [images] if _is_one(images) else images
        if self.inputs[0].dtype == "uint8":
            return pictures.decode(several, preprocessing)  # type: ignore[arg-type]
        return pictures.preprocess(several, preprocessing)  # type: ignore[arg-type]

    def _pixels(self, images: Any) -> Any:
        """Preprocess pictures; arrays and tensors are pixels already."""
        first = images[0] if isinstance(images, list | tuple) and images else images
        is_picture = isinstance(first, _FILES) or has(first, "getexif") or has(first, "read")
        return self.preprocess(images) if is_picture else images

    def top_k(self, logits: Any, k: int = 5) -> list[list[Guess]]:
        """Give the ``k`` best labels of each image, the best first.

        Args:
            logits: [b, classes] on the host.
            k: how many; all of them where there are fewer.

        Returns:
            For each image its labels with their scores: softmax where one class is right, sigmoid
            where several may be or there is a single output, the raw value of a regression.

        Raises:
            InputError: the logits have another shape, do not fit the labels, or are no numbers.
        """
        return top_k(logits, self.labels, self.scores, k)

    def selftest(self) -> SelfTest:
        """Run the golden input of the manifest: does this machine reproduce the golden output?

        In a coarser precision than the artifact's own, the gate is that of the coarser one.

        Raises:
            ManifestError: there is no golden input.
        """
        images = InputFormat.of(self.inputs[0].dtype)
        return selftest(self, self.name, self.manifest, images, self.rounds_as)

    def _for_numpy(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Give an output of the host as NumPy takes it: bfloat16, of its bytes, as float32."""
        return array if self._element(name).numpy else dlpack.widen(array)

    def _for_dlpack(self, name: str, array: NDArray[Any]) -> Any:
        """Give an output of the host as another library takes it back."""
        element = self._element(name)
        if element.numpy:
            return array
        return dlpack.Tensor(array.ctypes.data, array.shape, element, None, array)

    def _element(self, name: str) -> TensorType:
        return next(OF_ONNX[spec.dtype] for spec in self.outputs if spec.name == name)

    def _require_open(self) -> None:
        if not self._is_open:
            raise RunnerError(f"this runner ({self.name}) is closed; open another")


_FILES = (str, os.PathLike, bytes, bytearray, memoryview)


def _is_one(images: object) -> bool:
    """True for one picture; an array of four dimensions is several."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    # the bytes of a file and its lines can be iterated over
    is_file = isinstance(images, _FILES) or has(images, "read")
    return is_file or not isinstance(images, Iterable)


def require_fit(shape: Sequence[int], element: TensorType, spec: TensorSpec) -> None:
    """Require a batch's dtype and shape to be the artifact's.

    The number of images is free, and so is a size that a graph of another tool leaves open.
    """
    wanted = OF_ONNX[spec.dtype]
    if element is not wanted:
        raise InputError(
            f"images are {element}; input {spec.name!r} takes {wanted}{_remedy(element, wanted)}"
        )
    sizes = zip(shape[1:], spec.shape[1:], strict=False)
    fits = all(isinstance(wants, str) or size == wants for size, wants in sizes)
    if not fits or len(shape) != len(spec.shape):
        expected = ", ".join(str(size) for size in ("b", *spec.shape[1:]))
        hint = "; give one image as images[None]" if tuple(shape) == spec.shape[1:] else ""
        raise InputError(
            f"images have shape {list(shape)}; input {spec.name!r} takes [{expected}]{hint}"
        )


def element_of(array: NDArray[Any]) -> TensorType:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError("images are a masked array; fill what is masked, as images.filled(0)")
    element = OF_NUMPY.get(array.dtype)
    if element is None:
        raise InputError(f"images are {array.dtype}; expected a plain float, integer or bool")
    return element


def _remedy(element: TensorType, wanted: TensorType) -> str:
    if wanted.numpy is None:
        return "; NumPy has no bfloat16, give a torch tensor"
    if element.numpy == "uint8":
        return "; runner.preprocess() gives what it takes, normalised"
    return ""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Result of an artifact on its golden input; ``failures`` is empty where it passed.

    ``limit`` is what its relative error may be, as it was measured when the artifact was made; None
    holds the gate's own numbers against it.
    """

    output: str
    agreement: Agreement
    gate: Gate
    failures: tuple[str, ...]
    executed_on: str
    reference: str
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        word = "passed" if self.passed else f"failed ({'; '.join(self.failures)})"
        found = self.agreement
        allowed = "" if self.limit is None else f" ({self.limit:.1e} allowed)"
        return (
            f"selftest {word}: output {self.output!r} of {found.images} seeded images on "
            f"{self.executed_on}, relative error {found.relative:.1e}{allowed}, cosine "
            f"{found.cosine_min:.6f}, against {self.reference}"
        )


def selftest(
    run: Callable[[Any], Mapping[str, Any]],
    name: str,
    manifest: Manifest | None,
    input_format: InputFormat,
    rounds_as: Dtype | None = None,
) -> SelfTest:
    record = manifest.golden if manifest is not None else None
    if manifest is None or record is None or manifest.preprocessing is None:
        raise ManifestError(
            f"{'there is no manifest with a' if manifest is None else manifest.output + ' has no'} "
            "golden input to test with; export again, without --no-check"
        )
    # loaded here: they are a tenth of what importing this module would take
    from msn_export import golden
    from msn_export.metrics.metrics import Comparison, Errors
    from msn_export.metrics.tolerances import GATES, Limit, coarsest

    wanted = golden.values_of(record)
    outputs = run(golden.input_of(record, manifest.preprocessing, input_format))
    if record.output not in outputs:
        raise ManifestError(
            f"the manifest's golden output {record.output!r} is none of the artifact's; "
            "export it again"
        )
    comparison = Comparison()
    comparison.add(wanted, golden.vectors(np.asarray(outputs[record.output])))
    agreement, own = comparison.agreement(), manifest.rounds_as
    gate = GATES[own if rounds_as is None else coarsest(own, rounds_as)]
    allowed = record.limit if rounds_as is None else None  # it was measured in the artifact's own
    limit = None if allowed is None else Limit(Errors.uniform(allowed))
    failures = tuple(gate.failures(agreement, limit))
    return SelfTest(record.output, agreement, gate, failures, name, record.reference, allowed)
