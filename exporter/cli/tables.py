"""Results as tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from msn_export.benchmark.results import TOO_NOISY, footnotes
from msn_export.cli.console import Console
from msn_export.reporting.describe import (
    UNIMPORTANT,
    artifact_rows,
    inspection_rows,
    validation_rows,
)
from msn_export.schema import to_plain
from msn_export.spec import Dtype, Target

if TYPE_CHECKING:
    from rich.console import JustifyMethod

    from msn_export.benchmark.results import Bench, Timing
    from msn_export.commands.evaluate import Evaluated
    from msn_export.commands.hub import HubFolder
    from msn_export.commands.search import Searched
    from msn_export.commands.triton import Written
    from msn_export.compare.drift import Drift
    from msn_export.compare.inspection import Inspection
    from msn_export.compare.sides import Validation
    from msn_export.embedding.job import Embedded
    from msn_export.manifest import Manifest
    from msn_export.metrics.diagnose import StageDrift, TensorDrift
    from msn_export.triton_server.checks import Issue

# what a cell that begins so is printed in; the word is there for who sees no colour
COLOURS = {"passed": "green", "FAILED": "bold white on red", "not compared": "yellow"}


def show_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and texts; a verdict stands out."""
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, text in rows:
        verdict = next((word for word in COLOURS if text.startswith(word)), "")
        shown = f"[{COLOURS[verdict]}]{verdict}[/]" if verdict else ""
        table.add_row(name, f"{shown}{escape(text[len(verdict) :])}")
    console.print(table)


def show_validation(console: Console, validation: Validation) -> None:
    if console.as_json:
        console.print_json(validation)
        return
    title = f"{validation.candidate.name} against {validation.reference.name}"
    rows = list(validation_rows(validation))
    if not validation.passed:
        sides = (validation.reference.name, validation.candidate.name)
        rows.append(("next", f"msn-export drift {shlex.join(sides)}"))
    show_rows(console, title, rows)


def show_artifact(console: Console, output: Path, manifest: Manifest) -> None:
    if console.as_json:
        console.print_json({**to_plain(manifest), "output": str(output)})
        return
    memory = f"peak memory {manifest.peak_rss_bytes / 1e9:.2f} GB"
    took = ("took", f"{console.took}, {memory}")
    show_rows(
        console, str(output), [*artifact_rows(manifest), took, ("next", after(output, manifest))]
    )


def after(output: Path, manifest: Manifest) -> str:
    """Give the command that comes next for what was written."""
    file = shlex.quote(str(output))
    if manifest.engine is not None:
        return f"msn-export bench {file}, on its GPU"
    if manifest.fit is not None and manifest.source is None:
        return f"msn-export evaluate {file} LABELLED"
    quantised = manifest.quantization
    for_cpu = quantised is not None and quantised.base == Dtype.FP32  # not compiled
    if manifest.target is Target.ONNXRUNTIME or for_cpu:
        return f"msn-export bench {file}"
    half = " --fp16" if manifest.dtype is Dtype.FP32 else ""  # attention is fused in no fp32 engine
    return f"msn-export trt {file}{half} --images PICTURES"


def show_fit(console: Console, output: Path, manifest: Manifest) -> None:
    """Print an artifact with a classifier that was fitted, and how often it is right."""
    if not console.as_json:
        show_artifact(console, output, manifest)
        return
    record = manifest.fit
    assert record is not None  # of what fit wrote
    fitted = {
        "accuracy": record.accuracy, "classes": manifest.labels, "shots": record.shots,
        "C": record.C,
    }  # fmt: skip
    console.print_json({**to_plain(manifest), "output": str(output), **fitted})


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


def show_inspections(console: Console, found: list[Inspection], *, whole: bool) -> None:
    """Print one artifact, or what differs between two and matters; ``whole`` prints every row."""
    if console.as_json:
        plain: list[Any] = [{**to_plain(one), "other_bytes": one.other_bytes} for one in found]
        console.print_json(plain[0] if len(plain) == 1 else {"artifacts": plain})
        return
    described = [dict(inspection_rows(one)) for one in found]
    names = list(dict.fromkeys(name for one in described for name in one))
    table = Table("", *(escape(one.file) for one in found), show_lines=len(found) > 1)
    alike, unimportant = [], []
    for name in names:
        cells = [one.get(name, "-") for one in described]
        if len(found) > 1 and not whole:
            if len(set(cells)) == 1:
                alike.append(name)
                continue
            if name in UNIMPORTANT:
                unimportant.append(name)
                continue
        title = f"[bold]{name} ≠[/]" if len(set(cells)) > 1 else name
        table.add_row(title, *(escape(cell) for cell in cells))
    console.print(table)
    for what, rest in (("the same", alike), ("different, for --all", unimportant)):
        if rest:
            console.print(escape(f"{what}: {', '.join(rest)}"))


def show_bench(console: Console, bench: Bench) -> None:
    """Print who ran, the times with agreement beside them, and what was left out and why."""
    if console.as_json:
        console.print_json(bench)
        return
    console.print_whole(_contenders(bench))
    whole = _times(bench, _AGREEMENT)
    for table in [whole] if console.fits(whole) else [_times(bench), _agreements(bench)]:
        console.print_whole(table)
    if bench.preset == "paper":
        console.print_whole(_paper(bench))
    for line in footnotes(bench):
        text = escape(line)
        console.print(f"[bold yellow]{text}[/]" if line.startswith(TOO_NOISY) else text)


def _contenders(bench: Bench) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("contender", "runs in", "dtype", "takes"):
        table.add_column(title, overflow="fold", min_width=len(title))
    for title in ("CUDA graphs", "opened", "peak MB"):
        table.add_column(title, no_wrap=True, min_width=len(title))
    for one in bench.timed:
        found = [timing for timing in bench.timings if timing.contender == one.name]
        peak = max(timing.device_bytes or timing.peak_rss_bytes for timing in found)
        table.add_row(
            escape(one.name),
            escape(one.runs),
            ": ".join(filter(None, (one.dtype or "unknown", one.precision))),
            escape(one.takes),
            one.cuda_graphs or "-",
            f"{one.open_seconds:.1f} s",
            f"{peak / 1e6:.0f}",
        )
    return table


_AGREEMENT = ("cosine", "max_abs")
_FOLDED = 13  # columns that a contender's name is folded to where there is no more room


def _times(bench: Bench, more: tuple[str, ...] = ()) -> Table:
    """Lay out times and ratios; ``more`` are columns of agreement."""
    titles = ("median ms", "p90", "p99", "images/s", "ratio", *more)
    rows = [
        (timing, (*_figures(timing), *(_agreement(timing) if more else ())))
        for timing in bench.timings
    ]
    return _by_batch(bench, titles, rows)


def _agreements(bench: Bench) -> Table:
    return _by_batch(bench, _AGREEMENT, [(one, _agreement(one)) for one in bench.timings])


def _by_batch(
    bench: Bench, titles: Sequence[str], rows: Sequence[tuple[Timing, Sequence[str]]]
) -> Table:
    """Lay out a row a timing; figures are never clipped, names are folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = [_name(timing) for timing, _ in rows]
    widest = max(map(len, (*names, "contender")))
    table.add_column("batch", justify="right", no_wrap=True, min_width=len("batch"))
    table.add_column("contender", overflow="fold", min_width=min(widest, _FOLDED))
    for place, title in enumerate(titles):
        least = max(len(title), *(len(cells[place]) for _, cells in rows))
        justify: JustifyMethod = "left" if title in {"ratio", *_AGREEMENT} else "right"
        table.add_column(title, justify=justify, no_wrap=True, min_width=least)
    for batch in bench.batches:
        for timing, cells in rows:
            if timing.batch == batch:
                table.add_row(str(batch), escape(_name(timing)), *cells)
        table.add_section()
    return table


def _name(timing: Timing) -> str:
    return timing.contender if timing.split is None else f"{timing.contender}, {timing.split}"


def _figures(timing: Timing) -> tuple[str, ...]:
    ratio = timing.ratio
    mark = " *" if timing.noisy else ""
    return (
        *(_ms(time) for time in (timing.median_ms, timing.p90_ms, timing.p99_ms)),
        f"{timing.images_per_second:.1f}",
        f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f}){mark}",
    )


def _agreement(timing: Timing) -> tuple[str, str]:
    found = timing.agreement
    if found is None:
        return "-", "-"
    return f"{found.cosine_min:.6f}", f"{found.max_abs:.1e}"


def _ms(time: float) -> str:
    return f"{time:.0f}" if time >= 1000 else f"{time:.1f}" if time >= 100 else f"{time:.2f}"


_OF_PAPER = 9  # columns of a figure, as 1234567.8
_OF_NAMES = 24  # columns that two names above a figure are folded to


def _paper(bench: Bench) -> Table:
    """Lay times out as Hugging Face's table of attention implementations does."""
    names = [one.name for one in bench.timed]
    titles = [f"{name}, ms" for name in names]
    titles += [f"{names[0]} / {name}, x" for name in names[1:]]
    table = Table()
    table.add_column("batch", no_wrap=True, min_width=len("batch"))
    for title in titles:  # long names are folded, and figures are shorter
        table.add_column(escape(title), overflow="fold", min_width=_OF_PAPER, max_width=_OF_NAMES)
    for batch in bench.batches:
        found = [bench.timing(name, batch) for name in names]
        table.add_row(
            str(batch),
            *(f"{timing.median_ms:.1f}" for timing in found),
            *(
                f"{1 / timing.ratio.median:.2f}{' *' if timing.noisy else ''}"
                for timing in found[1:]
            ),
        )
    table.title = "median time of a call, and the speed-up: median of the rounds"
    return table


def show_evaluated(console: Console, found: Evaluated) -> None:
    """Print how often a model is right, for each class too, and what was left out."""
    if console.as_json:
        console.print_json(found)
        return
    of = "" if found.images == found.given else f" of {found.given:,}"
    rows = [("images", f"{found.images:,}{of} in {len(found.classes)} classes")]
    if found.top1 is not None and found.interval is not None:
        low, high = found.interval
        rows.append(("top-1", f"{found.top1:.1%}, 95 % of such samples {low:.1%} to {high:.1%}"))
    if found.top5 is not None:
        rows.append(("top-5", f"{found.top5:.1%}"))
    if found.knn is not None:
        rows.append(
            (f"{found.k} neighbours", f"{found.knn.sentence}, by {found.train or 'the others'}")
        )
    shares = found.per_class or (found.knn.per_class if found.knn is not None else {})
    worst = sorted((share, name) for name, share in shares.items() if share is not None)[:5]
    rows += [("least right", f"{name}: {share:.1%}") for share, name in worst]
    rows += [("broken", text) for text in found.broken[:5]]
    rows += [("runner", found.runner)]
    rows += [("precision", str(found.precision))] if found.precision else []
    rows += [("selftest", found.selftest),
             ("preprocessing", str(found.preprocessing))]  # fmt: skip
    rows += [("note", note) for note in found.notes]
    show_rows(console, f"{found.model} on {found.labelled}", rows)


def show_searched(console: Console, found: Searched) -> None:
    if console.as_json:
        console.print_json(found)
        return
    for query in found.queries:
        table = Table(title=escape(query.picture), title_justify="left")
        labelled = any(one.label is not None for one in query.neighbours)
        table.add_column("cosine", justify="right")
        for title in ("picture", *(["label"] if labelled else [])):
            table.add_column(title, overflow="fold")
        for one in query.neighbours:
            label = [escape(one.label or "")] if labelled else []
            table.add_row(f"{one.cosine:.4f}", escape(one.picture), *label)
        if query.error is not None:
            table.add_row("", escape(query.error))
        console.print(table)
    how = "all compared" if found.exact else "approximate"
    console.print(escape(f"{found.images:,} pictures of {found.folder}, {how}; {found.runner}"))
    for note in (*found.notes, *([f"written to {found.output}"] if found.output else [])):
        console.print(escape(note))


def show_written(console: Console, written: Written) -> None:
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


def show_hub(console: Console, written: HubFolder) -> None:
    if console.as_json:
        console.print_json(written)
        return
    rows = [("pipeline", written.task)]
    for graph in written.graphs:
        text = f"{graph.file}, {graph.dtype}, {graph.bytes / 1e6:.1f} MB"
        if graph.check is not None and graph.check.relative is not None:
            text += f"; relative error {graph.check.relative:.1e} on {graph.check.images} images"
        rows.append(("graph", text))
    rows += [("note", note) for note in written.notes]
    rows.append(("pushed", written.pushed or "no"))
    rows.append(("how to", str(Path(written.output, "README.md"))))
    show_rows(console, written.output, rows)


def show_findings(console: Console, repository: Path, findings: Sequence[Issue]) -> None:
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


def show_embedded(console: Console, embedded: Embedded) -> None:
    if console.as_json:
        console.print_json(embedded)
        return
    shape = ", ".join(str(size) for size in embedded.shape)
    rows = [
        ("rows", f"{embedded.output_name} [{shape}] float32"),
        *((("scores", str(embedded.scores)),) if embedded.scores else ()),
        ("broken", f"{embedded.broken} of {embedded.images} pictures"),
        *(("", text) for text in embedded.errors),
        *(("skipped", f"{count} {reason}") for reason, count in embedded.skipped.items()),
        ("turned", _turned(embedded)),
        ("files", ", ".join(embedded.files)),
        ("runner", f"{embedded.runner}, batch {embedded.batch}"),
        *((("precision", str(embedded.precision)),) if embedded.precision else ()),
        *((("cluster", embedded.cluster),) if embedded.cluster else ()),
        ("preprocessing", str(embedded.preprocessing)),
        ("selftest", embedded.selftest),
        *(("note", note) for note in embedded.notes),
        ("took", _took(embedded)),
    ]
    show_rows(console, embedded.output, rows)


def _turned(embedded: Embedded) -> str:
    if embedded.exif == "ignore":
        return "none: EXIF orientation is ignored"
    return f"{embedded.turned} of {embedded.images} pictures by their EXIF orientation"


def _took(embedded: Embedded) -> str:
    resumed = f", resumed at row {embedded.resumed_at}" if embedded.resumed_at else ""
    return (
        f"{embedded.seconds:.1f} s{resumed}, {embedded.images_per_second:.1f} images/s, "
        f"{embedded.workers} decoding; peak memory {embedded.peak_rss_bytes / 1e9:.2f} GB"
    )
