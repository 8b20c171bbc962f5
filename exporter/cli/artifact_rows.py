"""An artifact that was just written, as a person reads it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from msn_export.cli.console import Console
from msn_export.cli.validation_rows import counted
from msn_export.manifest import Manifest
from msn_export.manifest_records import CheckRecord, EngineRecord, SumsRecord
from msn_export.proof.quantization_rows import quantization_rows
from msn_export.records import to_plain

SHOWN = 6  # islands that are named


def show_artifact(console: Console, output: Path, manifest: Manifest) -> None:
    """Print what was written and what was checked."""
    if console.as_json:
        console.print_json({**to_plain(manifest), "output": str(output)})
        return
    table = Table(title=escape(str(output)), title_justify="left", show_header=False)
    for name, text in rows(manifest):
        table.add_row(name, escape(text))
    console.print(table)


def rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Describe an artifact in lines of a name and a text."""
    yield "file", f"{manifest.bytes / 1e6:.1f} MB, sha256 {manifest.sha256[:16]}…"
    if manifest.checkpoint is not None:
        yield "checkpoint", manifest.checkpoint.source
        for note in manifest.checkpoint.notes:
            yield "", note
    for title, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            shape = ", ".join(str(size) for size in spec.shape)
            yield title, f"{spec.name}: {spec.dtype} [{shape}]"
    if manifest.labels:
        yield "classes", f"{len(manifest.labels)}, scores: {manifest.scores or 'by their number'}"
    yield "batch", ", ".join(str(profile) for profile in manifest.profiles)
    made = manifest.preprocessing
    if made is not None:
        yield "preprocessing", f"{made.title}: {made.geometry}"
        yield "", made.values
    attention = manifest.attention
    yield "graph", f"{manifest.nodes} nodes, opset {manifest.opset}, {manifest.dtype}"
    yield "attention", f"{attention.fused} of {attention.expected} fused ({attention.form})"
    if manifest.islands:
        yield "fp32 islands", _islands(manifest.islands)
    if manifest.engine is not None:
        yield from _engine_rows(manifest.engine)
    if manifest.quantization is not None:
        yield from quantization_rows(manifest.quantization)
    yield from _check_rows(manifest.check)
    if manifest.quantization is not None:
        yield "in short", manifest.quantization.verdict
    for note in manifest.notes:
        yield "note", note
    yield "took", f"{manifest.seconds:.1f} s, peak memory {manifest.peak_rss_bytes / 1e9:.2f} GB"


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
    gemms = ", ".join(f"{count} in {dtype}" for dtype, count in engine.gemm_dtypes.items())
    eight = f"; {engine.quantised_products} of {engine.quantised_products} quantised ones so"
    yield "matrix products", gemms + (eight if engine.quantised_products else "")
    sums = ", ".join(f"{count} in {dtype}" for dtype, count in engine.accumulators.items())
    yield "fused attention", f"{engine.fused_attention} kernels{f'; sums: {sums}' if sums else ''}"
    if engine.attention is not None:
        yield from _attention_rows(engine.attention)
    yield "executed", f"{'yes' if engine.executed else 'no'}: {engine.reason}"


def _attention_rows(sums: SumsRecord) -> Iterator[tuple[str, str]]:
    if sums.bf16:
        yield (
            "bf16 attention",
            f"{len(sums.bf16)}, which fp16 does not hold: {', '.join(sums.bf16)}",
        )
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
    sizes = ", ".join(str(size) for size in check.batches)
    yield "check", f"{counted(check)}: {check.source}; batches {sizes}"
    yield "", f"against {check.reference}"
    yield "", f"on {check.executed_on}"
    yield "max_abs", f"{_figure(check.max_abs, '.2e')} (mean {_figure(check.mean_abs, '.2e')})"
    cosines = {
        "min": check.cosine_min,
        "p1": check.cosine_p1,
        "median": check.cosine_median,
    }
    yield "cosine", ", ".join(f"{name} {_figure(x, '.8f')}" for name, x in cosines.items())
    if check.relative is not None:
        allowed = [limits.get("relative") for limits in check.limits.values()]
        known = [limit for limit in allowed if limit is not None]
        most = f", {max(known):.1e} allowed" if known else ""
        yield "relative error", f"{check.relative:.2e}{most}"
    if check.limits_from:
        yield "", check.limits_from
    verdict = "passed" if check.passed else "failed"
    yield "verdict", f"{verdict} on {counted(check)}"


def _figure(value: float | None, form: str) -> str:
    return "not a number" if value is None else f"{value:{form}}"
