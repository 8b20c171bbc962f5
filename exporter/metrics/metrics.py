"""Agreement of an artifact's outputs with its reference's, image by image.

Nothing here decides: a verdict is ``msn_export.metrics.tolerances``'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def embedding_of(output: NDArray[Any]) -> NDArray[Any]:
    """Make one vector an image of an output [b, ...]: of tokens [b, n, dim] the [CLS] token."""
    first: NDArray[Any] = output[:, 0] if output.ndim == 3 else output.reshape(len(output), -1)
    return first


def nearest(embeddings: NDArray[Any]) -> NDArray[np.intp]:
    """Find each image's nearest other image by cosine, from embeddings [n, dim]."""
    if len(embeddings) < 2:
        raise ToleranceError(f"{len(embeddings)} image has no neighbour; give at least two")
    vectors = embeddings.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        parts = [
            _nearest_of(vectors, start, vectors[start : start + _ROWS])
            for start in range(0, len(vectors), _ROWS)
        ]
    return np.concatenate(parts)


_ROWS = 1024  # of n x n cosines at once: those of 10,000 images would take 800 MB


def _nearest_of(
    vectors: NDArray[np.float64], start: int, rows: NDArray[np.float64]
) -> NDArray[np.intp]:
    cosines = rows @ vectors.T
    at = np.arange(len(rows))
    cosines[at, start + at] = -np.inf
    neighbours: NDArray[np.intp] = cosines.argmax(axis=1)
    return neighbours


def class_agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Give the share of images of the same class in both logits, [n, classes] each.

    An image whose logits are not finite in the candidate has none.
    """
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    return float((same & np.isfinite(candidate).all(axis=1)).mean())


def neighbour_agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    """Give the share of images whose nearest neighbour is the same in both, [n, dim] each.

    None of one or two images, whose neighbours always agree. An image whose embedding is not finite
    in either agrees with nothing.
    """
    if reference.shape != candidate.shape:
        raise ToleranceError(
            f"embeddings have shapes {list(reference.shape)} and {list(candidate.shape)}; "
            "they must be the same"
        )
    if len(reference) < 3:
        return None
    same = nearest(reference) == nearest(candidate)
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(candidate).all(axis=1)
    return float((same & finite).mean())


TOKEN_PERCENTILE = 99  # of single tokens' errors: one in a hundred is worse


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of one output: ``|candidate - reference| / |reference|`` in the L2 norm.

    ``relative`` is that of all images together and ``image`` that of the worst image. ``cls`` and
    ``cls_image`` are the same of the [CLS] rows alone, ``token`` the 99th percentile and
    ``worst_token`` the largest of single tokens; all four are None where the output has no tokens.
    One image's error, and one token's, is relative to the root mean square norm of all of them:
    what rounding costs follows the values on the way, and an output may be small by chance.
    """

    relative: float
    image: float
    cls: float | None = None
    cls_image: float | None = None
    token: float | None = None
    worst_token: float | None = None

    @classmethod
    def uniform(cls, error: float) -> Errors:
        return cls(error, error, error, error, error, error)

    def times(self, factor: float) -> Errors:
        return Errors(
            *(None if value is None else value * factor for value in self.values())  # type: ignore[arg-type]
        )

    def plus(self, other: Errors) -> Errors:
        """Add each figure; what either side has not measured stays unknown."""
        pairs = zip(self.values(), other.values(), strict=True)
        return Errors(*(None if None in pair else sum(pair) for pair in pairs))  # type: ignore[arg-type]

    def at_least(self, other: Errors | float) -> Errors:
        """Take the larger of each figure; what was not measured here stays unknown."""
        least = Errors.uniform(other) if isinstance(other, float) else other
        return Errors(*map(_larger, self.values(), least.values()))  # type: ignore[arg-type]

    def to_json(self) -> dict[str, float | None]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def values(self) -> tuple[float | None, ...]:
        return tuple(self.to_json().values())


def _larger(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one
    return float(np.maximum(one, other))  # keeps NaN


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of one output over ``images`` images; each image is one vector, flattened.

    ``max_abs`` and ``mean_abs`` are absolute differences; ``reference_rms`` is the root mean
    square of the reference, the scale they are to be read against. ``relative``, ``image`` and
    the figures of tokens are those of ``Errors``. The norm ratio is the candidate's over the
    reference's. ``spread`` says how far the embeddings of different images are apart in the
    reference: the root mean square distance from their mean over that of the embeddings
    themselves; ``centred`` is the embeddings' error relative to that distance, both without their
    means: what all embeddings share tells none of them apart. NaN in either side shows in every
    figure it touches.

    None where it was not measured: ``rounding``, ``relative`` as a multiple of the reference's own
    rounding error; ``others``, the errors of those images whose reference is not in fp64 where
    others' is; ``neighbours`` and ``classes``, the shares of images whose nearest neighbour and
    whose class are the reference's.
    """

    images: int
    max_abs: float
    mean_abs: float
    cosine_min: float
    cosine_p1: float
    cosine_median: float
    norm_ratio_min: float
    norm_ratio_max: float
    reference_rms: float
    relative: float
    nan: int
    inf: int
    image: float = 0.0
    others: Errors | None = None
    cls: float | None = None
    cls_image: float | None = None
    cls_cosine: float | None = None
    token: float | None = None
    worst_token: float | None = None
    spread: float | None = None
    centred: float | None = None
    rounding: float | None = None
    neighbours: float | None = None
    classes: float | None = None

    @property
    def errors(self) -> Errors:
        return Errors(
            self.relative, self.image, self.cls, self.cls_image, self.token, self.worst_token
        )

    def to_json(self) -> dict[str, Any]:
        """Give the figures by name; of ``others`` the worst image's error."""
        figures = {name: getattr(self, name) for name in self.__slots__}
        return {**figures, "others": None if self.others is None else self.others.image}


@dataclass(slots=True)
class _Squares:
    """Sums of squares, one number a row: of the differences and of the reference."""

    error: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    def add(self, want: NDArray[Any], difference: NDArray[Any]) -> None:
        """Add rows [b, k]."""
        self.error += np.square(difference).sum(axis=1).tolist()
        self.reference += np.square(want).sum(axis=1).tolist()

    def together(self, rows: NDArray[np.bool_]) -> float:
        """Relate all rows' sums; nothing is small beside a reference of zeros."""
        error = np.asarray(self.error)[rows].sum()
        square = np.asarray(self.reference)[rows].sum()
        return float(np.sqrt(error / square)) if square > 0 else float("nan")

    def worst(self, rows: NDArray[np.bool_]) -> float:
        """Relate the largest of some rows' errors to the norm that all rows have on average."""
        return float(np.sqrt(np.max(np.asarray(self.error)[rows]) / np.mean(self.reference)))


@dataclass(slots=True)
class _Scatter:
    """Squared distances of vectors from their mean, summed up.

    Counted from the first vector: a large mean would swallow what is left of the distances.
    """

    first: NDArray[Any] | None = None
    total: Any = 0.0
    square: float = 0.0
    count: int = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Add vectors [b, k]."""
        if self.first is None:
            self.first = rows[0]
        moved = rows - self.first
        self.total = self.total + moved.sum(axis=0)
        self.square += float(np.square(moved).sum())
        self.count += len(rows)

    def around_mean(self) -> float:
        return float(np.maximum(self.square - np.square(self.total).sum() / self.count, 0.0))


@dataclass(slots=True)
class Comparison:
    """Gathers the figures of one output, batch after batch.

    Memory grows by a dozen floats an image and one float a token.
    """

    cosines: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    _exact: list[bool] = field(default_factory=list)
    _image: _Squares = field(default_factory=_Squares)
    _cls: _Squares = field(default_factory=_Squares)
    _cls_cosines: list[float] = field(default_factory=list)
    _tokens: list[NDArray[np.float32]] = field(default_factory=list)
    _apart: _Scatter = field(default_factory=_Scatter)
    _errors_apart: _Scatter = field(default_factory=_Scatter)
    _embedding_square: float = 0.0
    _abs_sum: float = 0.0
    _size: int = 0
    _nan: int = 0
    _inf: int = 0

    def add(
        self, reference: NDArray[Any], candidate: NDArray[Any], exact: Sequence[bool] | None = None
    ) -> None:
        """Compare a batch [b, ...] with its reference.

        ``exact`` says which rows of the reference are in fp64; None: all are of one kind.
        """
        if reference.shape != candidate.shape:
            raise ToleranceError(
                f"output has shape {list(candidate.shape)} and its reference "
                f"{list(reference.shape)}; they must be the same"
            )
        if len(reference) and not reference.size:
            raise ToleranceError(
                f"output has shape {list(reference.shape)}, which holds no numbers to compare"
            )
        kinds = [_is_float(side) for side in (candidate, reference)]
        if kinds[0] != kinds[1]:
            raise ToleranceError(
                f"output is {candidate.dtype} and its reference {reference.dtype}; "
                "they must be of one kind"
            )
        want = reference.reshape(len(reference), -1).astype(np.float64)
        have = candidate.reshape(len(candidate), -1).astype(np.float64)
        # of either side: a finite value where the reference is infinite is infinitely wrong, and
        # a gate on max_abs alone would allow it, for infinity scales what is allowed
        self._nan += int((np.isnan(have) | np.isnan(want)).sum())
        self._inf += int((np.isinf(have) | np.isinf(want)).sum())
        self._exact += [True] * len(want) if exact is None else list(exact)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            difference = want - have
            self._image.add(want, difference)
            norms = np.linalg.norm(want, axis=1), np.linalg.norm(have, axis=1)
            self.cosines += ((want * have).sum(axis=1) / (norms[0] * norms[1])).tolist()
            self.ratios += (norms[1] / norms[0]).tolist()
            self.worst += np.abs(difference).max(axis=1).tolist()
            self._abs_sum += float(np.abs(difference).sum())
            if reference.ndim == 3:
                self._add_tokens(want.reshape(reference.shape), have.reshape(reference.shape))
            self._add_spread(*(embedding_of(side) for side in (reference, candidate)))
        self._size += want.size

    def _add_tokens(self, want: NDArray[Any], have: NDArray[Any]) -> None:
        first, other = want[:, 0], have[:, 0]
        self._cls.add(first, first - other)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(other, axis=1)
        self._cls_cosines += ((first * other).sum(axis=1) / norms).tolist()
        self._tokens += list(np.linalg.norm(want - have, axis=2).astype(np.float32))

    def _add_spread(self, want: NDArray[Any], have: NDArray[Any]) -> None:
        want, have = want.astype(np.float64), have.astype(np.float64)
        self._apart.add(want)
        self._errors_apart.add(want - have)
        self._embedding_square += float(np.square(want).sum())

    @np.errstate(invalid="ignore", divide="ignore")  # what comes of infinity and 0 is meant
    def agreement(self) -> Agreement:
        if not self.cosines:
            raise ToleranceError("no image was compared; an empty set is not a pass")
        cosines, ratios = np.asarray(self.cosines), np.asarray(self.ratios)
        exact = np.asarray(self._exact)
        rows = exact if exact.any() else np.ones(len(exact), bool)
        errors = self._errors(rows)
        spread, centred = self._spread()
        # numpy's max keeps NaN; Python's max(0.0, nan) is 0.0
        return Agreement(
            images=len(self.cosines),
            max_abs=float(np.max(self.worst)),
            mean_abs=self._abs_sum / self._size,
            cosine_min=float(np.min(cosines)),
            cosine_p1=float(np.percentile(cosines, 1)),
            cosine_median=float(np.median(cosines)),
            norm_ratio_min=float(np.min(ratios)),
            norm_ratio_max=float(np.max(ratios)),
            reference_rms=float(np.sqrt(np.sum(self._image.reference) / self._size)),
            relative=errors.relative,
            nan=self._nan,
            inf=self._inf,
            image=errors.image,
            others=None if rows.all() else self._errors(~rows),
            cls=errors.cls,
            cls_image=errors.cls_image,
            cls_cosine=float(np.min(self._cls_cosines)) if self._tokens else None,
            token=errors.token,
            worst_token=errors.worst_token,
            spread=spread,
            centred=centred,
        )

    def _errors(self, rows: NDArray[np.bool_]) -> Errors:
        image = self._image.together(rows), self._image.worst(rows)
        if not self._tokens:
            return Errors(*image)
        tokens = self._token_errors(rows)
        return Errors(
            *image,
            self._cls.together(rows),
            self._cls.worst(rows),
            float(np.percentile(tokens, TOKEN_PERCENTILE)),
            float(np.max(tokens)),
        )

    def _token_errors(self, rows: NDArray[np.bool_]) -> NDArray[Any]:
        """Relate tokens' errors [rows, tokens] to the norm that all tokens have on average."""
        errors = np.asarray(self._tokens)[rows]
        related: NDArray[Any] = errors / np.sqrt(np.mean(self._image.reference) / errors.shape[1])
        return related

    def _spread(self) -> tuple[float | None, float | None]:
        """Relate the embeddings' distances from their mean, and their errors to those distances.

        None of a single image, which is nowhere apart.
        """
        if len(self.cosines) < 2:
            return None, None
        apart = np.float64(self._apart.around_mean())
        error = self._errors_apart.around_mean()
        return float(np.sqrt(apart / self._embedding_square)), float(np.sqrt(error / apart))


def _is_float(values: NDArray[Any]) -> bool:
    return not np.issubdtype(values.dtype, np.integer) and values.dtype != np.bool_


# How figures of several outputs combine: no output is worse than the result.
_SMALLEST = frozenset(
    ("images", "cosine_min", "cosine_p1", "cosine_median", "norm_ratio_min", "reference_rms",
     "cls_cosine", "spread", "neighbours", "classes")
)  # fmt: skip
_SUMMED = frozenset({"nan", "inf"})


def worst_of(agreements: list[Agreement]) -> Agreement:
    """Combine several outputs into the figures that none of them is worse than, but ``others``."""
    if not agreements:
        raise ToleranceError("no output was compared; an empty set is not a pass")

    def combined(name: str) -> float | None:
        found = [getattr(agreement, name) for agreement in agreements]
        measured = np.asarray([figure for figure in found if figure is not None], np.float64)
        if not measured.size:
            return None
        if name in _SUMMED:
            return float(measured.sum())
        return float(measured.min() if name in _SMALLEST else measured.max())

    names = (part.name for part in fields(Agreement) if part.name != "others")
    figures: dict[str, Any] = {name: combined(name) for name in names}
    for name in ("images", "nan", "inf"):
        figures[name] = int(figures[name])
    return Agreement(**figures)
