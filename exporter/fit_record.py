"""The record of a fitted classifier in a manifest. Standard library only: the runtime reads it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class HeldOutAccuracy:
    """The share of images whose class a fitted classifier finds; ``how`` it was measured.

    Shares are from 0 to 1. ``interval`` is Wilson's of ``top1`` at 95 %, ``confusion``
    [true][predicted] counts images, None of many classes. ``draws`` are the ``top1`` of each draw
    of the training images, with their mean and their standard deviation (of a sample; None of one).
    """

    how: str
    images: int
    top1: float
    top5: float | None
    interval: tuple[float, ...]
    per_class: dict[str, float | None]
    confusion: tuple[tuple[int, ...], ...] | None
    draws: tuple[float, ...] = ()
    mean: float | None = None
    deviation: float | None = None


@dataclass(frozen=True, slots=True)
class FitRecord:
    """A linear classifier that was fitted on the features of a frozen backbone.

    ``features`` of the last ``blocks`` blocks were fitted on ``images`` of ``classes``, ``shots``
    of each class (None: all), drawn by ``seed``. ``C`` is the inverse strength of the penalty;
    ``strengths`` holds by C what cross-validation found, where it chose. ``gradient`` is the
    objective's at the classifier, relative to its penalty's (``logistic_regression``), after
    ``steps``; ``weights`` is the sha256 of its rows [classes, width] in fp32. ``labelled`` and
    ``test`` are the pictures; their hash is over each one's path, class and size in bytes.
    ``broken`` pictures could not be read (``errors`` has the first), ``turned`` counts those that
    EXIF turned, ``skipped`` by reason what is no picture.

    ``relative`` is the error of the graph's logits against scikit-learn's decision function on
    PyTorch's features, on ``compared`` images, ``same`` the share of them whose class is the same;
    None without a check. ``accuracy`` is None where ``unmeasured`` says why.
    """

    features: Literal["msn", "embedding"]
    blocks: int
    C: float
    strengths: dict[str, float]
    images: int
    classes: int
    shots: int | None
    seed: int
    labelled: str
    labelled_sha256: str
    test: str | None
    test_sha256: str | None
    broken: int
    errors: tuple[str, ...]
    turned: int
    skipped: dict[str, int]
    gradient: float
    steps: int
    weights: str
    compared: int
    relative: float | None
    same: float | None
    accuracy: HeldOutAccuracy | None
    unmeasured: str = ""

    @property
    def sentence(self) -> str:
        """The classifier in one line."""
        blocks = f" of {self.blocks} blocks" if self.blocks > 1 else ""
        what = f"{self.classes} classes fitted on {self.features} features{blocks}"
        images = f"{self.images:,} images of {self.labelled}, C {self.C:g}"
        if self.accuracy is None:
            return f"{what} of {images}; accuracy not measured"
        share = f"{self.accuracy.top1:.1%} of {self.accuracy.images:,} images"
        return f"{what} of {images}; {share} right: {self.accuracy.how}"
