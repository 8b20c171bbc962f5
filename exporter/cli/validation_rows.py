"""A validation as a person reads it: the verdict first, then the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from msn_export.cli.console import Console
from msn_export.manifest_records import CheckRecord, ImageRecord
from msn_export.proof.validation import Side, Validation

WORST = 3  # images that are named


def show_validation(console: Console, validation: Validation) -> None:
    """Print the verdict and its figures."""
    if console.as_json:
        console.print_json(validation)
        return
    title = f"{validation.candidate.name} against {validation.reference.name}"
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, text in _rows(validation):
        table.add_row(name, escape(text))
    console.print(table)


def _rows(validation: Validation) -> Iterator[tuple[str, str]]:
    yield "verdict", "passed" if validation.passed else "FAILED"
    for reason in validation.reasons:
        yield "", reason
    if validation.cause is not None:
        yield "likely cause", validation.cause
    yield f"gate {validation.gate_name}", str(validation.gate)
    yield "", f"because {validation.gate.reason}"
    yield "reference", _side(validation.reference)
    yield "candidate", _side(validation.candidate)
    yield from check_rows(validation.check)
    if validation.own is not None:
        yield "", "and each with its own preprocessing:"
        yield from check_rows(validation.own)
    for note in validation.notes:
        yield "note", note


def _side(side: Side) -> str:
    return f"{side.kind}, {side.dtype}; {side.preprocessing}"


def check_rows(check: CheckRecord) -> Iterator[tuple[str, str]]:
    """Describe one check; each output has its own line."""
    sizes = ", ".join(map(str, check.batches))
    what = "inputs" if check.source.startswith("seeded noise") else "images"
    yield "check", f"{check.images} {what}: {check.source}; batches {sizes}"
    yield "", f"{check.reference} | {check.executed_on}"
    for name, figures in check.outputs.items():
        yield f"  {name}", _figures(figures)
    yield "worst", _worst(check.per_image)


def _figures(figures: dict[str, float | None]) -> str:
    def shown(name: str, form: str) -> str:
        value = figures.get(name)
        return "not a number" if value is None else format(value, form)

    parts = [
        f"cosine min {shown('cosine_min', '.8f')}, p1 {shown('cosine_p1', '.8f')}",
        f"max_abs {shown('max_abs', '.2e')}, mean {shown('mean_abs', '.1e')}",
        f"norm ratio {shown('norm_ratio_min', '.5f')} to {shown('norm_ratio_max', '.5f')}",
    ]
    if figures.get("rounding") is not None:
        parts.append(f"{shown('rounding', '.1f')} times the reference's own rounding")
    for name, what in (("neighbours", "nearest neighbours"), ("classes", "classes")):
        if figures.get(name) is not None:
            parts.append(f"{what} agree {shown(name, '.1%')}")
    if figures.get("nan") or figures.get("inf"):
        parts.append(f"{figures['nan']} NaN, {figures['inf']} infinite")
    return "\n".join(parts)


def _worst(images: Sequence[ImageRecord]) -> str:
    """Name the images that agree least; one without a number is the worst of all."""
    by_cosine = sorted(images, key=lambda i: -1.0 if not _finite(i.cosine) else i.cosine or 0.0)
    return "\n".join(f"{image.name}: {_figure(image)}" for image in by_cosine[:WORST])


def _finite(value: float | None) -> bool:
    return value is not None and value == value  # noqa: PLR0124  NaN


def _figure(image: ImageRecord) -> str:
    if not _finite(image.cosine):
        return "not a number"
    return f"cosine {image.cosine:.8f}, max_abs {image.max_abs:.2e}"
