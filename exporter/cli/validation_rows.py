"""A validation as a person reads it: the verdict first, then the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from msn_export.check.gate import in_words
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
    yield "verdict", f"{'passed' if validation.passed else 'FAILED'} on {counted(validation.check)}"
    for reason in validation.reasons:
        yield "", reason
    if validation.cause is not None:
        yield "likely cause", validation.cause
    yield from _gate(validation)
    yield "reference", _side(validation.reference)
    yield "candidate", _side(validation.candidate)
    yield from check_rows(validation.check)
    if validation.own is not None:
        yield "", "and each with its own preprocessing:"
        yield from check_rows(validation.own)
    for note in validation.notes:
        yield "note", note


def _gate(validation: Validation) -> Iterator[tuple[str, str]]:
    check, gate = validation.check, validation.gate
    if check.limits:
        yield f"limits {validation.gate_name}", check.limits_from
        if check.gate:
            yield "", in_words(check.gate)
        return
    yield f"gate {validation.gate_name}", str(gate)
    yield "", f"because {gate.reason}"
    if check.limits_from:
        yield "", check.limits_from


def counted(check: CheckRecord) -> str:
    """Count what a check ran, of how many there were."""
    what = "inputs" if check.source.startswith("seeded noise") else "images"
    of = f" of {check.given:,}" if check.given > check.images else ""
    return f"{check.images}{of} {what}"


def _side(side: Side) -> str:
    return f"{side.kind}, {side.dtype}; {side.preprocessing}"


def check_rows(check: CheckRecord) -> Iterator[tuple[str, str]]:
    """Describe one check; each output has its own line."""
    sizes = ", ".join(map(str, check.batches))
    yield "check", f"{counted(check)}: {check.source}; batches {sizes}"
    yield "", f"{check.reference} | {check.executed_on}"
    for name, figures in check.outputs.items():
        yield f"  {name}", _figures(figures, check.limits.get(name, {}))
    yield "worst", _worst(check.per_image)


def _figures(figures: dict[str, float | None], limits: dict[str, float | None]) -> str:
    def shown(name: str, form: str) -> str:
        value = figures.get(name)
        return "not a number" if value is None else format(value, form)

    def error(name: str) -> str:
        limit = limits.get(name)
        return shown(name, ".2e") + ("" if limit is None else f" of {limit:.1e} allowed")

    parts = [f"relative error {error('relative')}, worst image {error('image')}"]
    if figures.get("cls") is not None:
        parts.append(f"[CLS] {error('cls')}, worst image {error('cls_image')}")
        parts.append(f"tokens p99 {error('token')}, worst {error('worst_token')}")
    parts += [
        f"cosine min {shown('cosine_min', '.8f')}, p1 {shown('cosine_p1', '.8f')}",
        f"max_abs {shown('max_abs', '.2e')}, mean {shown('mean_abs', '.1e')}",
        f"norm ratio {shown('norm_ratio_min', '.5f')} to {shown('norm_ratio_max', '.5f')}",
    ]
    if figures.get("centred") is not None:
        parts.append(
            f"{shown('centred', '.1e')} of the distance between different images "
            f"({shown('spread', '.2g')} of their norm)"
        )
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
