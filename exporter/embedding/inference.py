"""Pictures through a model: a batch of decoded pictures in, a batch of rows out."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import __version__
from msn_export.embedding.decode import Decoder, read
from msn_export.errors import GraphError, SpecError, ToleranceError
from msn_export.host import usable_cores
from msn_export.manifest import Described
from msn_export.runtime.runner import scores_of
from msn_export.spec import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from msn_export.embedding.decode import Decoded
    from msn_export.embedding.job import Listing
    from msn_export.feed import Feed
    from msn_export.manifest import Manifest
    from msn_export.onnx_header import GraphMetadata
    from msn_export.runtime import Runner
    from msn_export.runtime.runner import Precision
    from msn_export.spec import BatchRange, ImageSize, TensorSpec


BEST = np.dtype([("class", "<i4"), ("score", "<f4")])


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one batch.

    ``vectors`` is float32 [k, ...], NaN where ``errors`` (by position) says why; ``best`` is the
    best classes of each and their scores, [k, n] of ``BEST``, the best first, where the model has a
    classifier. ``turned`` counts the pictures that their EXIF orientation turned. ``hashes`` are
    the sha256 of the files, as in ``PictureBatch``.
    """

    vectors: NDArray[np.float32]
    best: NDArray[Any] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    turned: int = 0
    hashes: NDArray[np.uint8] | None = None


def joined(batches: Iterable[tuple[int, Rows]]) -> Iterator[tuple[int, Rows]]:
    """Join batches that follow each other: each one written is a wait for the disk."""
    ordered = sorted(batches, key=lambda batch: batch[0])
    run: list[Rows] = []
    begin = end = 0
    for start, rows in ordered:
        if run and start != end:
            yield begin, _concatenated(run)
            run = []
        if not run:
            begin = end = start
        run.append(rows)
        end += len(rows.vectors)
    yield begin, _concatenated(run)


def _concatenated(batches: list[Rows]) -> Rows:
    errors: dict[int, str] = {}
    row = 0
    for rows in batches:
        errors |= {row + index: text for index, text in rows.errors.items()}
        row += len(rows.vectors)
    bests = [rows.best for rows in batches if rows.best is not None]
    best = np.concatenate(bests) if bests else None
    hashed = [rows.hashes for rows in batches if rows.hashes is not None]
    hashes = np.concatenate(hashed) if hashed else None
    vectors = np.concatenate([rows.vectors for rows in batches])
    return Rows(vectors, best, errors, sum(rows.turned for rows in batches), hashes)


# Outputs that an image's vector is read from, best first; the last is that of other exporters
_PREFERRED = ("embedding", "mean_embedding", "pooler_output", "logits", "last_hidden_state")
_LOGITS = "logits"
_FLOATS = ("float", "float16", "bfloat16", "double")


@dataclass(frozen=True, slots=True)
class Reading:
    """The outputs that are read: the vector's, and the classifier's where there is one.

    ``scores`` says what the logits become; None decides by the number of classes. ``top`` is how
    many classes are kept; with ``normalize`` a vector is divided by its norm.
    """

    vector: str
    logits: str | None
    scores: Scores | None = None
    top: int = 1
    normalize: bool = False


def reading_of(
    model: str,
    outputs: Sequence[TensorSpec],
    wanted: str | None,
    scores: Scores | None = None,
) -> Reading:
    """Choose what to read off a model; ``scores`` is what its manifest says of its logits."""
    names = [spec.name for spec in outputs]
    if wanted is not None and wanted not in names:
        raise SpecError(
            f"--output-name {wanted!r}: {model} has no such output; it has {', '.join(names)}"
        )
    preferred = [name for name in _PREFERRED if name in names]
    vector = wanted or (preferred[0] if preferred else names[0] if len(names) == 1 else None)
    if vector is None:
        raise SpecError(
            f"{model} has the outputs {', '.join(names)}; choose one with --output-name"
        )
    _require_rows(model, outputs[names.index(vector)])
    if _LOGITS not in names:
        return Reading(vector, None)
    shape = outputs[names.index(_LOGITS)].shape
    if scores is None and len(shape) == 2 and isinstance(shape[1], int):
        scores = Scores.of(None, shape[1])
    return Reading(vector, _LOGITS, scores)


def _require_rows(model: str, spec: TensorSpec) -> None:
    """Refuse now what no batch could be read from; a shape that is not known has no axes here."""
    if len(spec.shape) == 1 or spec.dtype not in _FLOATS:
        raise GraphError(
            f"{model}: output {spec.name!r} is {spec.dtype}{list(spec.shape)}; expected floats of "
            "two axes or more, a row for each image; choose another with --output-name, or export "
            "the scores before argmax or squeeze"
        )


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Decoded pictures: ``pixels`` uint8 [b, h, w, c], black where one is broken.

    ``errors`` says by position why. ``turned`` counts the pictures that their EXIF orientation
    turned. ``hashes`` uint8 [b, 32] are the sha256 of the files, zeros where one is not known.
    """

    pixels: NDArray[np.uint8]
    errors: dict[int, str]
    turned: int
    hashes: NDArray[np.uint8]


SHA256 = 32  # bytes


def stack(chunk: Sequence[Decoded], size: ImageSize, channels: int) -> PictureBatch:
    """Stack decoded pictures.

    The row of a black one is thrown away. So every batch but the last has the same size, and a
    picture's row does not depend on whether its neighbours are broken.
    """
    pixels = np.zeros((len(chunk), size.height, size.width, channels), np.uint8)
    hashes = np.zeros((len(chunk), SHA256), np.uint8)
    errors: dict[int, str] = {}
    turned = 0
    for index, picture in enumerate(chunk):
        if isinstance(picture, str):
            errors[index] = picture
        else:
            pixels[index] = picture.pixels
            turned += picture.turned
            if picture.sha256:
                hashes[index] = np.frombuffer(picture.sha256, np.uint8)
    return PictureBatch(pixels, errors, turned, hashes)


def read_rows(outputs: Mapping[str, Any], reading: Reading, batch: PictureBatch) -> Rows:
    """Read a batch's rows off the model's outputs.

    NaN or infinity in a vector or in the logits is an error, as a broken picture is.
    """
    count, errors = len(batch.pixels), dict(batch.errors)
    vectors = np.array(outputs[reading.vector], np.float32)
    if vectors.ndim < 2 or len(vectors) != count:
        raise GraphError(
            f"output {reading.vector!r} is {list(vectors.shape)} for {count} images; expected "
            "a row for each"
        )
    _note_infinite(reading.vector, vectors, errors)
    best = None
    if reading.logits is not None:
        logits = np.asarray(outputs[reading.logits], np.float64)
        if logits.ndim != 2 or len(logits) != count or not logits.shape[1]:
            raise GraphError(
                f"output {reading.logits!r} is {list(logits.shape)} for {count} images; expected "
                "[images, classes]"
            )
        _note_infinite(reading.logits, logits, errors)
        best = _best_of(logits, reading.scores, reading.top)
    if reading.normalize:
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
        for index in np.flatnonzero((lengths == 0).reshape(count, -1).any(axis=1)).tolist():
            errors.setdefault(index, f"the model's {reading.vector} is zero: it has no direction")
        vectors = (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    vectors[list(errors)] = np.nan
    return Rows(vectors, best, errors, batch.turned, batch.hashes)


def _note_infinite(name: str, values: NDArray[Any], errors: dict[int, str]) -> None:
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    for index in np.flatnonzero(~finite):
        errors.setdefault(int(index), f"the model's {name} has NaN or infinity")


def _best_of(logits: NDArray[np.float64], scores: Scores | None, top: int) -> NDArray[Any]:
    """Find the ``top`` best classes of each row [k, classes] and their scores, the best first."""
    count, classes = logits.shape
    best = np.zeros((count, min(top, classes)), BEST)
    if top == 1:
        best["class"] = logits.argmax(axis=1)[:, None]
    else:
        best["class"] = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    with np.errstate(invalid="ignore", over="ignore"):
        best["score"] = np.take_along_axis(scores_of(logits, scores), best["class"], 1)
    return best


@dataclass(frozen=True, slots=True)
class OpenModel(Described):
    """A model that is open, on this machine or on a worker with msn-export ``version``.

    ``name`` is what runs it and on what, ``selftest`` what came of its golden input there.
    """

    name: str
    manifest: Manifest | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchRange
    selftest: str
    version: str = __version__
    metadata: GraphMetadata | None = None
    precision: Precision | None = None

    @classmethod
    def of(cls, runner: Runner, selftest: str) -> OpenModel:
        return cls(
            runner.name, runner.manifest, runner.inputs, runner.outputs, runner.batch, selftest,
            metadata=runner.metadata, precision=runner.precision,
        )  # fmt: skip


def require_selftest(runner: Runner, *, check: bool) -> str:
    """Run the manifest's golden input, before hours are spent on a model that is wrong here."""
    if not check:
        return "none (--no-check)"
    if runner.manifest is None or runner.manifest.golden is None:
        return "none: no golden input came with the model"
    selftest = runner.selftest()
    if not selftest.passed:
        raise ToleranceError(
            f"{selftest}: this machine does not compute what the model was checked for; export it "
            "here, or run it all the same with --no-check"
        )
    return str(selftest)


class LocalExecutor:
    """Embeds the pictures of a folder with a runner that is open on this machine."""

    cluster: str | None = None

    def __init__(
        self, listing: Listing, runner: Runner, selftest: str, workers: int | None
    ) -> None:
        self.pictures, self._runner = listing, runner
        self.model = OpenModel.of(runner, selftest)
        self.workers = workers or decoders()

    def rows(
        self, feed: Feed, reading: Reading, batch: int, missing: Sequence[range]
    ) -> Iterator[tuple[int, Rows]]:
        """Make the rows of each batch of ``missing``, in order, with the first's number."""
        paths = self.pictures.paths
        under_way: deque[tuple[range, PictureBatch]] = deque()

        def batches() -> Iterator[NDArray[Any]]:
            for one, pictures in decoded(paths, feed, batch, self.workers, missing):
                under_way.append((one, pictures))
                yield feed(pictures.pixels)

        for outputs in self._runner.map(batches()):
            one, pictures = under_way.popleft()
            yield one.start, read_rows(outputs, reading, pictures)


def decoders() -> int:
    """Count decoding processes: one a core, for those that are ahead of the model wait."""
    return min(16, len(usable_cores()))


def decoded(
    paths: Sequence[Path | str], feed: Feed, batch: int, workers: int, missing: Sequence[range]
) -> Iterator[tuple[range, PictureBatch]]:
    """Decode batches of pictures ahead of a model.

    Args:
        paths: the pictures.
        feed: how a model takes them.
        batch: its batch size.
        workers: processes that decode.
        missing: the batches to decode, as ranges of ``paths``.

    Returns:
        Each batch with its range.
    """
    chosen = chain.from_iterable(paths[one.start : one.stop] for one in missing)
    preprocessing = feed.preprocessing
    reader = partial(read, preprocessing=preprocessing)
    with closing(Decoder(reader, workers=workers, ahead=2 * batch + workers)) as decoder:
        pictures = decoder(map(Path, chosen))
        for one in missing:
            few = list(islice(pictures, len(one)))
            yield one, stack(few, preprocessing.size, preprocessing.channels)
