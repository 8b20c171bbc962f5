"""Facts and figures in rows of a name and a text: for pages and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export.artifact import is_checkpoint
from msn_export.benchmark.results import milliseconds, spread_of
from msn_export.manifest import (
    AccuracyRecord,
    CheckRecord,
    EngineRecord,
    ImageRecord,
    Manifest,
    QuantizationRecord,
    ShareRecord,
    SumsRecord,
)
from msn_export.metrics.tolerances import in_words
from msn_export.reporting.describe_fit import fit_rows
from msn_export.spec import Scores, TensorSpec

if TYPE_CHECKING:
    from msn_export.compare.inspection import Inspection
    from msn_export.compare.sides import Side, Validation

WORST = 3  # images that are named
SHOWN = 6  # islands that are named


def origin_of(manifest: Manifest | None) -> list[tuple[str, str]]:
    """Describe the weights it came from, and how pictures become its input."""
    if manifest is None:
        return []
    rows = []
    if manifest.checkpoint is not None:
        rows += [
            ("checkpoint", manifest.checkpoint.source),
            ("weights' sha256", manifest.checkpoint.sha256),
        ]
        rows += [("note", note) for note in manifest.checkpoint.notes]
    preprocessing = manifest.preprocessing
    if preprocessing is not None:
        rows.append(("preprocessing", f"{preprocessing.title}: {preprocessing.geometry}"))
        rows.append(("normalisation", preprocessing.values))
    if manifest.labels:
        rows.append(("classes", f"{len(manifest.labels)}: {', '.join(manifest.labels[:5])}, …"))
        scores = manifest.scores or Scores.of(None, len(manifest.labels))
        rows.append(("scores", f"{scores} of the logits"))
    rows.append(("versions", ", ".join(f"{n} {v}" for n, v in manifest.versions.items())))
    return rows


def quantization_rows(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    yield "quantised", f"{record.products} of {record.expected} products to {record.format}"
    smoothing = "off" if record.smoothing is None else f"{record.smoothing:g}"
    what = f"ranges by {record.observer}, smoothing {smoothing}"
    what += ", attention too" if record.attention else ""
    what += ", biases corrected" if record.bias_correction else ""
    yield "", f"{what}; the rest in {record.base}"
    if record.smoothing_errors:
        errors = ", ".join(f"{name} {error:.2%}" for name, error in record.smoothing_errors.items())
        yield "", f"error of the products by smoothing: {errors}"
    for name, reason in record.kept.items():
        yield "kept", f"{name} in {reason}"
    images = f"{record.calibration_images} calibrated on, {len(record.held_out)} held out"
    yield "images", f"{images} (seed {record.seed}); {record.ranges.file}"
    yield "sizes", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in record.sizes.items())
    for title, shares in (("neighbours", record.neighbours), ("classes", record.classes)):
        measured = {name: share for name, share in shares.items() if share is not None}
        if measured:
            yield (
                f"same {title}",
                ", ".join(f"{share:.1%} {name}" for name, share in measured.items()),
            )
    yield from _compiled(record)


def _compiled(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    compiled = record.compiled
    if "reason" in compiled:
        yield "compiled", f"no: {compiled['reason']}"
        if "reason" not in record.latency:
            yield "timed", _timed(record)
        return
    yield "compiled", f"by {compiled['compiler']}, counted, not executed"
    for name in (record.base, record.format):
        one = compiled[name]
        eight = f", {one['multiplied']} of {one['products']} in {name}" if one["products"] else ""
        kernels = f"{kernels_of(one['kernels'])}, {one['fused_attention']} fused attention"
        products = f"products {counted_by(one['gemm_dtypes'])}{eight}"
        yield "", f"{name}: {kernels}, {products}, {one['bytes'] / 1e6:.1f} MB"
    yield "timed", _timed(record)


def _timed(record: QuantizationRecord) -> str:
    latency = record.latency
    if "reason" in latency:
        return f"no: {latency['reason']}"
    names = (record.base, record.format)
    times = ", ".join(f"{milliseconds(latency[name])} ms {name}" for name in names)
    copies = "" if "reason" in record.compiled else ", copies included"  # to a GPU and back
    spread = spread_of(latency, record.format)
    text = f"batch {latency['batch']}{copies}: {times}; on {latency['device']}"
    return f"{text}; {spread}" if spread else text


def file_rows(found: Inspection, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    """Describe an exported file for a page, beside what its tables have."""
    yield "described by", found.described
    if found.distrusted:
        yield "not believed", found.distrusted
    yield from _tensor_rows(found)
    yield "batch", ", ".join(map(str, found.profiles)) or "unknown"
    yield "made by", found.made_by or "unknown"
    yield "executed", found.executed
    yield "sha256", found.sha256
    if found.multiply_adds is not None:
        yield "multiply-adds", f"{found.multiply_adds / 1e9:.2f} billion an image"
    if found.accumulators:
        sums = ", ".join(
            f"{dtype} in {kernels_of(count)}" for dtype, count in found.accumulators.items()
        )
        yield "attention sums in", sums
    if manifest is None:
        return
    if manifest.source is not None:
        yield "made from", f"{manifest.source.file}, sha256 {manifest.source.sha256}"
    if manifest.quantization is not None:
        yield from quantization_rows(manifest.quantization)
        yield "in short", manifest.quantization.verdict
    if manifest.fit is not None:
        yield from fit_rows(manifest.fit, itself=manifest.source is None)
    for note in manifest.notes:
        yield "note", note


def _tensor_rows(found: Inspection | Manifest) -> Iterator[tuple[str, str]]:
    for title, specs in (("input", found.inputs), ("output", found.outputs)):
        for spec in specs:
            yield title, f"{spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def validation_rows(validation: Validation) -> Iterator[tuple[str, str]]:
    """Give the verdict, why, and the figures behind it."""
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


def gate_words(check: CheckRecord, numbers: Mapping[str, float], reason: str = "") -> str:
    """Put what a check was held to in words: the limits measured on its images, or fixed numbers.

    Args:
        check: what was measured.
        numbers: the fixed ones of its gate, which count where nothing was measured.
        reason: why they are what they are.
    """
    measured = {name: limits.get("relative") for name, limits in check.limits.items()}
    most = {name: limit for name, limit in measured.items() if limit is not None}
    if not most:
        fixed = in_words(check.gate or numbers)
        return f"{fixed}, because {reason}" if reason else fixed
    several = len(most) > 1
    limits = ", ".join(
        f"{limit:.1e}{f' in {name}' if several else ''}" for name, limit in most.items()
    )
    source = f": {check.limits_from}" if check.limits_from else ""
    asked = f"; {in_words(check.gate)}" if check.gate else ""
    return f"relative error at most {limits} (measured{source}){asked}"


def counted(check: CheckRecord) -> str:
    """Count what a check ran, of how many there were."""
    what = "inputs" if check.source.startswith("seeded noise") else "images"
    of = f" of {check.given:,}" if check.given > check.images else ""
    return f"{check.images}{of} {what if max(check.images, check.given) != 1 else what[:-1]}"


def _ran(check: CheckRecord) -> str:
    sizes = ", ".join(map(str, check.batches))
    apart = "; no operator joins images of a batch" if check.images_apart else ""
    return f"{counted(check)}: {check.source}; batches {sizes}{apart}"


def _side(side: Side) -> str:
    return f"{side.kind}, {side.dtype}; {side.preprocessing}"


def check_rows(check: CheckRecord) -> Iterator[tuple[str, str]]:
    yield "check", _ran(check)
    yield "", f"{check.reference} | {check.executed_on}"
    for name, figures in check.outputs.items():
        yield f"  {name}", _figures(figures, check.limits.get(name, {}))
    yield "worst", _worst(check.per_image)
    yield from accuracy_rows(check.accuracy)


def accuracy_rows(found: AccuracyRecord | None) -> Iterator[tuple[str, str]]:
    """Give the accuracy of both sides on labelled images, and what McNemar's test makes of it."""
    if found is None:
        return
    of = f" of {found.given:,}" if found.given > found.images else ""
    yield (
        "accuracy",
        f"{_share(found.candidate)} in the candidate, {_share(found.reference)} in the reference",
    )
    yield "", f"by {found.by} on {found.images:,}{of} images of {found.labelled}"
    allowed = f", {100 * found.allowed:g} points are allowed" if found.allowed else ""
    yield (
        "",
        f"{found.conclusion}{allowed}: {found.lost} lost, {found.gained} gained, McNemar's exact "
        f"test p = {found.p_value:.2g}; with 95 % confidence the loss is below "
        f"{100 * found.loss_bound:.1f} points",
    )


def _share(found: ShareRecord) -> str:
    low, high = found.interval
    return f"{found.top1:.1%} ({low:.1%} to {high:.1%})"


def _figures(figures: dict[str, float | None], limits: dict[str, float | None]) -> str:
    def shown(name: str, form: str) -> str:
        return _figure(figures.get(name), form)

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
    return "\n".join(f"{image.name}: {_of_image(image)}" for image in by_cosine[:WORST])


def _finite(value: float | None) -> bool:
    return value is not None and value == value  # noqa: PLR0124  NaN


def _of_image(image: ImageRecord) -> str:
    if not _finite(image.cosine):
        return "not a number"
    return f"cosine {image.cosine:.8f}, max_abs {image.max_abs:.2e}"


def artifact_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "file", f"{manifest.bytes / 1e6:.1f} MB, sha256 {manifest.sha256[:16]}…"
    if manifest.checkpoint is not None:
        yield "checkpoint", manifest.checkpoint.source
        for note in manifest.checkpoint.notes:
            yield "", note
    yield from _tensor_rows(manifest)
    if manifest.labels:
        yield "classes", f"{len(manifest.labels)}, scores: {manifest.scores or 'by their number'}"
    yield "batch", ", ".join(str(profile) for profile in manifest.profiles)
    preprocessing = manifest.preprocessing
    if preprocessing is not None:
        yield "preprocessing", f"{preprocessing.title}: {preprocessing.geometry}"
        yield "", preprocessing.values
    attention = manifest.attention
    yield "graph", f"{manifest.nodes} nodes, opset {manifest.opset}, {manifest.dtype}"
    yield "attention", f"{attention.fused} of {attention.expected} fused ({attention.form})"
    if manifest.islands:
        yield "fp32 islands", _islands(manifest.islands)
    if manifest.engine is not None:
        yield from _engine_rows(manifest.engine)
    if manifest.quantization is not None:
        yield from quantization_rows(manifest.quantization)
    if manifest.fit is not None:
        yield from fit_rows(manifest.fit, itself=manifest.source is None)
    yield from _check_rows(manifest.check)
    if manifest.quantization is not None:
        yield "in short", manifest.quantization.verdict
    for note in manifest.notes:
        yield "note", note


def _islands(maxima: Mapping[str, float | None]) -> str:
    """Count them, with the largest maximum that was measured; a weight has none."""
    peaks = [peak for peak in maxima.values() if peak is not None]
    most = f", up to {max(peaks):.6g}" if peaks else ""
    named, left = sorted(maxima)[:SHOWN], len(maxima) - SHOWN
    more = f" and {left} more in the manifest" if left > 0 else ""
    return f"{len(maxima)}{most}: {', '.join(named)}{more}"


def _engine_rows(engine: EngineRecord) -> Iterator[tuple[str, str]]:
    yield "engine", f"{engine.backend} {engine.version} for {engine.targets}"
    blocks = sorted(set(engine.kernels_per_block.values()))
    span = f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}" if blocks else "?"
    yield "kernels", f"{engine.kernels} in all, {span} a block"
    gemms, sums = counted_by(engine.gemm_dtypes, " in "), counted_by(engine.accumulators, " in ")
    eight = f"; {engine.quantised_products} of {engine.quantised_products} quantised ones so"
    yield "matrix products", gemms + (eight if engine.quantised_products else "")
    yield (
        "fused attention",
        f"{kernels_of(engine.fused_attention)}{f'; sums: {sums}' if sums else ''}",
    )
    if engine.attention is not None:
        yield from _attention_rows(engine.attention)
    yield "executed", f"{'yes' if engine.executed else 'no'}: {engine.reason}"


def _attention_rows(sums: SumsRecord) -> Iterator[tuple[str, str]]:
    if sums.bf16:
        names = ", ".join(sums.bf16)
        yield "bf16 attention", f"{len(sums.bf16)}, which fp16 does not hold: {names}"
    check = sums.check
    if check is None:
        return
    worst = f"least cosine {_figure(check.cosine_min, '.8f')}, {check.images} images"
    peaks = [
        f"{what} up to {max(found):.6g}"
        for what, values in (("scores", sums.scores), ("sums", sums.sums))
        if (found := [peak for peak in values.values() if peak is not None])
    ]
    yield "emulated", ", ".join([worst, *peaks])
    yield "", f"on {check.executed_on}"


def _check_rows(check: CheckRecord | None) -> Iterator[tuple[str, str]]:
    if check is None:
        yield "check", "none (--no-check)"
        return
    yield "check", _ran(check)
    yield "", f"against {check.reference}"
    yield "", f"on {check.executed_on}"
    yield "max_abs", f"{_figure(check.max_abs, '.2e')} (mean {_figure(check.mean_abs, '.2e')})"
    cosines = {"min": check.cosine_min, "p1": check.cosine_p1, "median": check.cosine_median}
    yield "cosine", ", ".join(f"{name} {_figure(x, '.8f')}" for name, x in cosines.items())
    if check.relative is not None:
        allowed = [limits.get("relative") for limits in check.limits.values()]
        measured = [limit for limit in allowed if limit is not None]
        most = f", {max(measured):.1e} allowed" if measured else ""
        yield "relative error", f"{check.relative:.2e}{most}"
    if check.limits_from:
        yield "", check.limits_from
    yield from accuracy_rows(check.accuracy)
    verdict = "passed" if check.passed else "FAILED"
    yield "verdict", f"{verdict} on {counted(check)}"


def _figure(value: float | None, form: str) -> str:
    return "not a number" if value is None else f"{value:{form}}"


# Of layer types as TensorRT-RTX 1.7.1 names them, read beside the names of an engine's 112 kernels
_KINDS = {
    "kgen": "generated code: element-wise work, layout, fused attention",
    "runtime_fusion": "a matrix product with what follows it",
    "gemm": "a matrix product alone",
    "correlation": "a convolution",
    "shape_call": "sizes, on the host",
}
# what may differ between two artifacts of one model and changes nothing for who runs them
UNIMPORTANT = frozenset(
    {
        "described by", "sha256", "made by", "command", "nodes", "kernels a block",
        "kinds of kernel", "layout only",
    }
)  # fmt: skip


def inspection_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """Describe an artifact in lines of a name and a text; the names are the same for each."""
    yield "kind", found.kind
    yield "described by", found.described
    if found.distrusted:
        yield "not believed", found.distrusted
    yield "size", _size(found)
    yield "sha256", f"{found.sha256[:16]}…"
    yield "made by", found.made_by or "unknown"
    yield "checkpoint", found.checkpoint or "unknown"
    yield "inputs", _tensors(found.inputs)
    yield "outputs", _tensors(found.outputs)
    yield "preprocessing", str(found.preprocessing or "unknown")
    yield "profiles", ", ".join(map(str, found.profiles)) or "unknown"
    yield "runs on", found.runs_on
    yield "precision", found.precision or "unknown"
    yield "matrix products", counted_by(found.gemm_dtypes) or "unknown"
    if found.convolution_dtypes:
        yield "convolutions", counted_by(found.convolution_dtypes)
    yield "fused attention", fused(found)
    for runtime, precision in found.compiled.items():
        yield f"in {runtime}", str(precision)
    if found.islands:
        yield "fp32 islands", ", ".join(found.islands)
    if found.labels:
        yield "classes", f"{len(found.labels)}: {', '.join(found.labels[:5])}, …"
    if found.fitted is not None:
        yield "classifier", found.fitted
    yield "nodes", str(found.nodes or "unknown")
    if found.multiply_adds is not None:
        yield "multiply-adds", f"{found.multiply_adds / 1e9:.3f} billion an image"
    if found.kind == "engine":
        yield "kernels", str(found.kernels or "unknown")
        yield "kernels a block", _per_block(found.kernels_per_block)
        yield "attention sums in", counted_by(found.accumulators) or "unknown"
        yield "kinds of kernel", "; ".join(
            f"{count} {kind}{f' ({_KINDS[kind]})' if kind in _KINDS else ''}"
            for kind, count in found.kernel_kinds.items()
        ) or "unknown"  # fmt: skip
        yield "layout only", _layout(found)
    yield "check", found.check
    yield "executed", found.executed
    yield "command", found.command or "unknown"


def _size(found: Inspection) -> str:
    whole = f"{found.bytes / 1e6:.1f} MB"
    if found.weight_bytes is None or found.other_bytes is None:
        return whole
    return (
        f"{whole}: weights {found.weight_bytes / 1e6:.1f} MB, "
        f"the rest {found.other_bytes / 1e6:.1f} MB"
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(map(str, specs)) or "unknown"


def counted_by(counts: Mapping[str, int], joint: str = " ") -> str:
    """List counts, each with what was counted."""
    return ", ".join(f"{count}{joint}{name}" for name, count in counts.items())


def kernels_of(count: int) -> str:
    """Count kernels."""
    return f"{count} kernel" if count == 1 else f"{count} kernels"


def fused(found: Inspection) -> str:
    """Count the fused attention cores, of how many there are."""
    if found.attention_fused is None:
        return "unknown"
    return f"{found.attention_fused} of {found.attention_expected}"


def _per_block(per_block: Mapping[str, int]) -> str:
    return " ".join(str(count) for count in per_block.values()) or "unknown"


def _layout(found: Inspection) -> str:
    if not found.kernel_kinds:
        return "unknown"
    places = found.layout_only[:4]
    more = f"; and {len(found.layout_only) - 4} more" if len(found.layout_only) > 4 else ""
    return f"{kernels_of(len(found.layout_only))} ({'; '.join(places)}{more})"


def significant(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, and every digit before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(places, 0)}f}"


def short(name: str) -> str:
    """Name a file without its folder, a checkpoint as it is."""
    return name if is_checkpoint(name) else Path(name).name
