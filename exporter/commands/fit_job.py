"""The options of ``msn-export fit``. They load no torch, so that a mistake is reported at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from msn_export.commands.jobs import OnnxJob
from msn_export.errors import SpecError
from msn_export.options import Opt
from msn_export.schema import Count, Index, Within
from msn_export.spec import Head


def _strength(text: str) -> float | None:
    """Read a positive number, or ``auto``, which is None."""
    if text == "auto":
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SpecError(f"{text!r} is no strength; expected a number above 0, or auto")
    return number


@dataclass(frozen=True, slots=True)
class FitJob(OnnxJob):
    """Options of ``msn-export fit``: its own, and those of ``msn-export onnx``.

    ``C`` None chooses it by cross-validation, ``shots`` None takes all pictures, ``draws`` None is
    three. The classes are those of ``labelled``.
    """

    labelled: Path = field(kw_only=True)
    features: Annotated[
        Literal["msn", "embedding"],
        Opt("msn: [CLS] before the final LayerNorm, centred, of norm 1; embedding: behind it."),
    ] = "msn"
    shots: Annotated[
        Count | None, Opt("Pictures of each class that are trained on, drawn. Default: all.")
    ] = None
    draws: Annotated[
        Count | None,
        Opt("Draws of --shots that accuracy is measured on; the first is exported. Default: 3."),
    ] = None
    seed: Annotated[Index, Opt("Of the draws and of cross-validation.")] = 0
    C: Annotated[
        Annotated[float, Within(0, above=True)] | None,
        Opt(
            "Inverse strength of the L2 penalty; auto: by cross-validation.",
            "--C",
            read=_strength,
            form="X|auto",
            none="auto",
        ),
    ] = 400.0
    test: Annotated[
        Path | None,
        Opt("Labelled pictures that measure accuracy. Default: those not trained on.", exists=True),
    ] = None
    heads: Annotated[tuple[Head, ...], Opt("Output beside logits; repeatable.", "--head")] = ()
    blocks: Annotated[
        Count, Opt("Of how many last blocks the features hold [CLS], side by side.")
    ] = 1
    images: Annotated[
        Path | None, Opt("Pictures to check on. Default: some of LABELLED.", exists=True)
    ] = None
    labels: None = None

    def require_consistent(self) -> None:
        """Refuse what ``onnx`` refuses, and several draws of all pictures."""
        OnnxJob.require_consistent(self)
        if self.draws is not None and self.shots is None:
            raise SpecError("--draws repeats the draw of --shots; give --shots too")

    def _sources(self) -> list[Path]:
        given = [self.labelled] if self.test is None else [self.labelled, self.test]
        return [*OnnxJob._sources(self), *given]

    def _default_output(self) -> Path:
        return Path("classifier.onnx")

    def onnx_job(self, **changes: Any) -> OnnxJob:
        """Give the options of the export, with some changed."""
        own = {one.name: getattr(self, one.name) for one in fields(OnnxJob)}
        return OnnxJob(**{**own, **changes})
