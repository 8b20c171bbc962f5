"""A reference and a candidate, brought together: same image size, outputs matched by name."""

from __future__ import annotations

from dataclasses import dataclass

from msn_export.errors import SpecError, ToleranceError
from msn_export.models.named import AS_IT_SAYS, Choices
from msn_export.preprocessing import Preprocessing, assumed
from msn_export.proof.artifact import Artifact, is_checkpoint, open_artifact


@dataclass(frozen=True, slots=True)
class Pair:
    """Two artifacts and the outputs both have; ``alone`` names those that only one has."""

    reference: Artifact
    candidate: Artifact
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    alone: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes the pixels both sides are given: the reference's own where it says.

        Else the candidate's, else hf; ``notes`` say which was assumed.
        """
        known = self.reference.preprocessing or self.candidate.preprocessing
        return known or assumed(self.reference.size, self.reference.channels)

    @property
    def room(self) -> int:
        """How many images memory affords both at once."""
        return min(self.reference.room, self.candidate.room)


def open_pair(reference: str, candidate: str, choices: Choices = AS_IT_SAYS) -> Pair:
    """Open both sides; a checkpoint is read for the other side's image size.

    Raises:
        SpecError: they take images of different sizes, or ``choices`` are for neither.
        ToleranceError: they have no output in common.
    """
    if choices and not any(map(is_checkpoint, (reference, candidate))):
        raise SpecError(
            "--variant, --weights and --labels are for a checkpoint, and neither side is one"
        )
    opened: dict[str, Artifact] = {}
    size = None
    for name in sorted(dict.fromkeys((reference, candidate)), key=is_checkpoint):
        opened[name] = open_artifact(name, choices=choices, size=size)
        size = size or opened[name].size
    left, right = opened[reference], opened[candidate]
    if left.size != right.size:
        raise SpecError(
            f"{left.name} takes images of {left.size} and {right.name} of {right.size}; export "
            "one of them again with the other's --image-size"
        )
    if left.channels != right.channels:
        raise SpecError(
            f"{left.name} takes {left.channels} channels and {right.name} {right.channels}; "
            "they cannot see the same images"
        )
    outputs = tuple(name for name in left.outputs if name in right.outputs)
    if not outputs:
        raise ToleranceError(
            f"nothing to compare: {left.name} has {', '.join(left.outputs)}, {right.name} has "
            f"{', '.join(right.outputs)}; export one of them again with the other's --head"
        )
    notes = [*left.notes, *right.notes, *_assumed(left, right)]
    alone = []
    for side, other in ((left, right), (right, left)):
        names = [name for name in side.outputs if name not in other.outputs]
        if names and side.kind != "checkpoint":  # every head can be read off a checkpoint
            alone.append(f"not compared, only {side.name} has it: {', '.join(names)}")
    return Pair(left, right, outputs, tuple(dict.fromkeys(notes)), tuple(alone))


def _assumed(left: Artifact, right: Artifact) -> tuple[str, ...]:
    if left.preprocessing is None and right.preprocessing is None:
        return ()  # whoever takes pictures says what is assumed, unless it was told
    for silent, other in ((left, right), (right, left)):
        if silent.preprocessing is None:
            return (f"{silent.name} does not say its preprocessing: that of {other.name} assumed",)
    return ()
