"""What was written, compared or found, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from msn_export.bench.results import footnotes
from msn_export.cli.console import Console
from msn_export.commands.triton import Written
from msn_export.compare.drift import Drift
from msn_export.compare.inspection import Inspection
from msn_export.compare.validation import Side, Validation
from msn_export.manifest import CheckRecord, EngineRecord, ImageRecord, Manifest, SumsRecord
from msn_export.metrics.block_errors import StageDrift, TensorDrift
from msn_export.metrics.tolerances import in_words
from msn_export.report.describe import quantization_rows
from msn_export.schema import to_plain
from msn_export.spec import TensorSpec
from msn_export.triton.checks import Issue

if TYPE_CHECKING:
    from msn_export.bench.results import Bench, Timing
    from msn_export.cli.console import Console


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
    return "\n".join(f"{image.name}: {_of_image(image)}" for image in by_cosine[:WORST])


def _finite(value: float | None) -> bool:
    return value is not None and value == value  # noqa: PLR0124  NaN


def _of_image(image: ImageRecord) -> str:
    if not _finite(image.cosine):
        return "not a number"
    return f"cosine {image.cosine:.8f}, max_abs {image.max_abs:.2e}"


SHOWN = 6  # islands that are named


def show_artifact(console: Console, output: Path, manifest: Manifest) -> None:
    """Print what was written and what was checked."""
    if console.as_json:
        console.print_json({**to_plain(manifest), "output": str(output)})
        return
    table = Table(title=escape(str(output)), title_justify="left", show_header=False)
    for name, text in artifact_rows(manifest):
        table.add_row(name, escape(text))
    console.print(table)


def artifact_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
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


def show_drift(console: Console, found: Drift) -> None:
    """Print every stage, and inside the block that parted or errs the most."""
    if console.as_json:
        console.print_json({**to_plain(found), "passed": found.passed})
        return
    title = f"{found.candidate} against {found.reference}"
    console.print(_stages(f"{title}, {found.check.images} images", found.stages, found.parted))
    console.print(escape(found.sentence))
    console.print(escape(f"{found.how[:1].upper()}{found.how[1:]}."))
    if found.inside:  # an engine shows nothing inside a block
        console.print(_tensor_table(f"inside {found.suspect}", found.inside))
    for note in found.notes:
        console.print(escape(f"note: {note}"))


def _stages(title: str, stages: Sequence[StageDrift], parted: str | None) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in ("1 - cos", "error", "own", "allowed", "max_abs", "peak", "headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak in", overflow="fold")
    for stage in stages:
        tensor, own = stage.tensor, stage.own
        first = " (\\[CLS])" if tensor.first_token else ""
        table.add_row(
            f"{escape(stage.name)}{first}",
            f"{1 - tensor.cosine_min:.1e}",
            f"{tensor.relative:.1e}",
            f"{own.relative:.1e}" if own else "",
            f"{own.allowed:.1e}" if own else "",
            f"{tensor.max_abs:.1e}",
            f"{stage.peak:.4g}",
            f"{stage.headroom:,.0f}" if stage.headroom >= 100 else f"{stage.headroom:.1f}",
            escape(_short(stage)),
            style="bold red" if stage.name == parted else None,
        )
    return table


def _short(stage: StageDrift) -> str:
    """Leave out of a tensor's name the block it stands in the row of."""
    name = stage.peak_tensor
    for block in (stage.name, stage.name.replace("block ", "blocks.")):
        name = name.removeprefix(block) or name
    return name.removesuffix(".LayerNormalization").lstrip(" .")


def _tensor_table(title: str, tensors: Sequence[TensorDrift]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    for name in ("1 - cos", "error", "max_abs", "largest", "not finite"):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in tensors:
        table.add_row(
            escape(tensor.name),
            f"{1 - tensor.cosine_min:.1e}",
            f"{tensor.relative:.1e}",
            f"{tensor.max_abs:.1e}",
            f"{tensor.largest:.4g}",
            str(tensor.nan + tensor.inf or ""),
        )
    return table


def show_inspections(console: Console, found: list[Inspection]) -> None:
    """Print one artifact, or two side by side with what differs marked."""
    if console.as_json:
        plain: list[Any] = [{**to_plain(one), "other_bytes": one.other_bytes} for one in found]
        console.print_json(plain[0] if len(plain) == 1 else {"artifacts": plain})
        return
    described = [dict(inspection_rows(one)) for one in found]
    names = list(dict.fromkeys(name for one in described for name in one))
    table = Table("", *(escape(one.file) for one in found), show_lines=len(found) > 1)
    for name in names:
        cells = [one.get(name, "-") for one in described]
        title = f"[bold]{name} ≠[/]" if len(set(cells)) > 1 else name
        table.add_row(title, *(escape(cell) for cell in cells))
    console.print(table)


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
    yield "matrix products", _counts(found.gemm_dtypes)
    yield "fused attention", _fused(found)
    if found.islands:
        yield "fp32 islands", ", ".join(found.islands)
    yield "nodes", str(found.nodes or "unknown")
    if found.multiply_adds is not None:
        yield "multiply-adds", f"{found.multiply_adds / 1e9:.3f} billion an image"
    if found.kind == "engine":
        yield "kernels", str(found.kernels or "unknown")
        yield "kernels a block", _per_block(found.kernels_per_block)
        yield "attention sums in", _counts(found.accumulators)
        yield "kinds of kernel", _counts(found.kernel_kinds)
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
    return "; ".join(
        f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs
    ) or "unknown"  # fmt: skip


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "unknown"


def _fused(found: Inspection) -> str:
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
    return f"{len(found.layout_only)} kernels ({'; '.join(places)}{more})"


def show_bench(console: Console, bench: Bench) -> None:
    """Print who ran, the times with agreement beside them, and what was left out and why."""
    if console.as_json:
        console.print_json(bench)
        return
    console.print(_contenders(bench))
    console.print(_times(bench))
    if bench.preset == "paper":
        console.print(_paper(bench))
    for line in footnotes(bench):
        console.print(escape(line))


def _contenders(bench: Bench) -> Table:
    table = Table(
        "contender", "runs in", "dtype", "takes", "CUDA graphs", "opened", "peak MB",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for one in bench.timed:
        found = [timing for timing in bench.timings if timing.contender == one.name]
        peak = max(timing.device_bytes or timing.peak_rss_bytes for timing in found)
        table.add_row(
            escape(one.name),
            escape(one.runs),
            one.dtype or "unknown",
            escape(one.takes),
            one.cuda_graphs or "-",
            f"{one.open_seconds:.1f} s",
            f"{peak / 1e6:.0f}",
        )
    return table


def _times(bench: Bench) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("batch", justify="right")
    table.add_column("contender", no_wrap=True)
    for title in ("median ms", "p90", "p99", "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(escape(f"time / {bench.baseline}"), no_wrap=True)
    table.add_column("cosine", no_wrap=True)
    table.add_column("max_abs", no_wrap=True)
    for batch in bench.batches:
        for timing in (one for one in bench.timings if one.batch == batch):
            table.add_row(*_row(timing))
        table.add_section()
    return table


def _row(timing: Timing) -> list[str]:
    ratio, agreement = timing.ratio, timing.agreement
    if agreement is None:
        compared = ["-", "-"]
    else:
        compared = [f"{agreement.cosine_min:.6f}", f"{agreement.max_abs:.1e}"]
    return [
        str(timing.batch),
        escape(timing.contender),
        *(_ms(time) for time in (timing.median_ms, timing.p90_ms, timing.p99_ms)),
        f"{timing.images_per_second:.1f}",
        f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})",
        *compared,
    ]


def _ms(time: float) -> str:
    return f"{time:.0f}" if time >= 1000 else f"{time:.1f}" if time >= 100 else f"{time:.2f}"


def _paper(bench: Bench) -> Table:
    """Lay times out as Hugging Face's table of attention implementations does."""
    names = [one.name for one in bench.timed]
    titles = [f"{name}, ms" for name in names]
    titles += [f"{names[0]} / {name}, x" for name in names[1:]]
    table = Table("batch", *map(escape, titles))
    for batch in bench.batches:
        found = [bench.timing(name, batch) for name in names]
        table.add_row(
            str(batch),
            *(f"{timing.median_ms:.1f}" for timing in found),
            *(f"{1 / timing.ratio.median:.2f}" for timing in found[1:]),
        )
    table.title = "median time of a call, and the speed-up: median of the rounds"
    return table


def show_written(console: Console, written: Written) -> None:
    """Print which models are in the repository now, and where to read on."""
    if console.as_json:
        console.print_json(written)
        return
    table = Table(title=escape(written.repository), title_justify="left", show_header=False)
    for name in written.models:
        table.add_row("model", f"{escape(name)}, version {written.version}")
    table.add_row("Triton", escape(written.image))
    for note in written.notes:
        table.add_row("note", escape(note))
    table.add_row("how to", escape(str(Path(written.repository, written.model, "README.md"))))
    console.print(table)


def show_findings(console: Console, repository: Path, findings: Sequence[Issue]) -> None:
    """Print what is wrong, then what could not be known."""
    wrong = sum(finding.level == "wrong" for finding in findings)
    if console.as_json:
        console.print_json(
            {
                "repository": str(repository),
                "passed": wrong == 0,
                "findings": [to_plain(finding) for finding in findings],
            }
        )
        return
    ordered = sorted(findings, key=lambda finding: finding.level == "note")
    table = Table("", "model", show_lines=True)
    for title in ("where", "what"):
        table.add_column(title, overflow="fold")
    for finding in ordered:
        level = f"[bold red]{finding.level}[/]" if finding.level == "wrong" else finding.level
        table.add_row(level, *(escape(x) for x in (finding.model, finding.where, finding.what)))
    if findings:
        console.print(table)
    console.print(f"{escape(str(repository))}: {f'{wrong} wrong' if wrong else 'nothing wrong'}")
