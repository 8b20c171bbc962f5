"""What a report says of artifacts and of what was measured, in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from msn_export.compare.drift import Drift
from msn_export.compare.inspection import Inspection, believed, inspect
from msn_export.compare.sides import is_checkpoint
from msn_export.compare.validation import Validation
from msn_export.engine.census import Census, summary
from msn_export.engine.kernels import (
    Kernel,
    gemm_dtype,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
)
from msn_export.graph import io
from msn_export.graph.summary import PARTS, precision_map
from msn_export.manifest import EngineRecord, Manifest, QuantizationRecord
from msn_export.metrics.block_errors import StageDrift, TensorDrift
from msn_export.metrics.evaluate import Verified
from msn_export.metrics.metrics import embedding_of, nearest
from msn_export.metrics.tolerances import GATES, HEADROOM, in_words
from msn_export.report import facts
from msn_export.report.facts import ArtifactRow, Chip, EngineRow, Grid, VerdictWord
from msn_export.spec import Scores


def verdict(
    artifacts: Sequence[facts.ArtifactRow], agreements: Sequence[facts.AgreementRow]
) -> tuple[facts.State, str]:
    """Say in one line whether all that ran agrees, what did not run and what was not checked."""
    failed = [found.candidate for found in agreements if not found.passed]
    foreign = [artifact.name for artifact in artifacts if artifact.verdict == "not believed"]
    stale = [artifact.name for artifact in artifacts if artifact.verdict == "stale"]
    wrong = (
        (failed, "not what the reference is"),
        (foreign, "the manifest is not believed"),
        (stale, "made from another graph or checkpoint than the one here"),
    )
    if failed or foreign or stale:
        return "failed", "; ".join(f"{', '.join(names)}: {what}" for names, what in wrong if names)
    if not agreements:
        return "partial", "Nothing was compared"
    open_ends = []
    for state, words in (("compiled, not run", "did not run"), ("not checked", "was not checked")):
        names = [artifact.name for artifact in artifacts if artifact.verdict == state]
        open_ends += [f"{', '.join(names)} {words}"] if names else []
    if open_ends:
        return "partial", "; ".join(["Everything that ran agrees", *open_ends])
    return "passed", "Every artifact agrees with its reference"


def sentences(
    artifacts: Sequence[facts.ArtifactRow],
    agreements: Sequence[facts.AgreementRow],
    drifts: Sequence[facts.DriftRow],
) -> list[str]:
    """Say what each comparison and each engine came to."""
    said = []
    for found in agreements:
        check, word = found.check, "agrees" if found.passed else "does not agree"
        cosine = "none" if check.cosine_min is None else f"{check.cosine_min:.7f}"
        said.append(
            f"{found.candidate} {word} with {found.reference} on {check.images} images: "
            f"least cosine {cosine}"
            + (f". {'; '.join(found.reasons)}" if found.reasons else "")
            + (f". {found.cause}" if found.cause else "")
        )
    said += [f"{d.candidate} parts from {d.reference} at {d.parted}" for d in drifts if d.parted]
    said += [artifact.distrusted for artifact in artifacts if artifact.distrusted]
    for artifact in artifacts:
        engine = artifact.engine
        if engine is not None:
            products = ", ".join(f"{n} in {dtype}" for dtype, n in engine.products.items())
            said.append(
                f"{artifact.name}: {engine.kernels} kernels, attention fused in {engine.fused} of "
                f"{engine.blocks} blocks, matrix products {products}; {engine.executed}"
            )
    return said


def title_of(manifest: Manifest | None, artifacts: Sequence[facts.ArtifactRow]) -> str:
    """Name the report after the checkpoint, else after the first artifact."""
    if manifest is not None and manifest.checkpoint is not None:
        return manifest.checkpoint.source
    return artifacts[0].name


def subtitle_of(manifest: Manifest | None) -> str:
    """Say which shape of ViT-MSN it is."""
    config = manifest.config if manifest is not None else None
    if config is None:
        return "ViT-MSN"
    return (
        f"ViT-MSN, {config.get('depth')} blocks of {config.get('dim')} with {config.get('heads')} "
        f"heads, images of {_by(config.get('image_size'))} in patches of "
        f"{_by(config.get('patch_size'))}"
    )


def _by(pair: object) -> str:
    return "x".join(map(str, pair)) if isinstance(pair, list) else str(pair)


def origin_of(manifest: Manifest | None) -> list[tuple[str, str]]:
    """Say which weights it came from, and how pictures become its input."""
    if manifest is None:
        return []
    rows = []
    if manifest.checkpoint is not None:
        rows += [
            ("checkpoint", manifest.checkpoint.source),
            ("weights' sha256", manifest.checkpoint.sha256),
        ]
        rows += [("note", note) for note in manifest.checkpoint.notes]
    made = manifest.preprocessing
    if made is not None:
        rows.append(("preprocessing", f"{made.title}: {made.geometry}"))
        rows.append(("normalisation", made.values))
    if manifest.labels:
        rows.append(("classes", f"{len(manifest.labels)}: {', '.join(manifest.labels[:5])}, …"))
        scores = manifest.scores or Scores.of(None, len(manifest.labels))
        rows.append(("scores", f"{scores} of the logits"))
    rows.append(("versions", ", ".join(f"{n} {v}" for n, v in manifest.versions.items())))
    return rows


def now() -> str:
    """Give the time, or SOURCE_DATE_EPOCH (reproducible-builds.org) where that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    at = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else datetime.now(UTC)
    return at.strftime("%d %B %Y, %H:%M UTC")


def quantization_rows(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    """Describe a quantisation in lines of a name and a text."""
    yield "quantised", f"{record.products} of {record.expected} products to {record.format}"
    what = ", ".join(
        name
        for name, used in (
            (f"ranges by {record.observer}", True),
            (
                "smoothing off" if record.smoothing is None else f"smoothing {record.smoothing:g}",
                True,
            ),
            ("attention too", record.attention),
            ("biases corrected", record.bias_correction),
        )
        if used
    )
    yield "", f"{what}; the rest in {record.base}"
    if record.smoothing_errors:
        errors = ", ".join(f"{name} {error:.2%}" for name, error in record.smoothing_errors.items())
        yield "", f"error by smoothing: {errors}"
    for name, reason in record.kept.items():
        yield "kept", f"{name} in {reason}"
    yield (
        "images",
        (
            f"{record.calibration_images} calibrated on, {len(record.held_out)} held out "
            f"(seed {record.seed}); {record.ranges.file}"
        ),
    )
    yield "sizes", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in record.sizes.items())
    for title, shares in (("neighbours", record.neighbours), ("classes", record.classes)):
        known = {name: share for name, share in shares.items() if share is not None}
        if known:
            yield f"same {title}", ", ".join(f"{share:.1%} {name}" for name, share in known.items())
    yield from _compiled(record)


def _compiled(record: QuantizationRecord) -> Iterator[tuple[str, str]]:
    told = record.compiled
    if "reason" in told:
        yield "compiled", f"no: {told['reason']}"
        if "reason" not in record.latency:
            yield "timed", _timed(record)
        return
    yield "compiled", f"by {told['compiler']}, counted, not executed"
    for name in (record.base, record.format):
        one = told[name]
        eight = f", {one['multiplied']} of {one['products']} in {name}" if one["products"] else ""
        gemms = ", ".join(f"{count} {dtype}" for dtype, count in one["gemm_dtypes"].items())
        yield (
            "",
            (
                f"{name}: {one['kernels']} kernels, {one['fused_attention']} fused attention, "
                f"products {gemms}{eight}, {one['bytes'] / 1e6:.1f} MB"
            ),
        )
    yield "timed", _timed(record)


def _timed(record: QuantizationRecord) -> str:
    told = record.latency
    if "reason" in told:
        return f"no: {told['reason']}"
    times = ", ".join(f"{told[name]:.2f} ms {name}" for name in (record.base, record.format))
    copies = "" if "reason" in record.compiled else ", copies included"  # to a GPU and back
    return f"batch {told['batch']}{copies}: {times}; on {told['device']}"


# TensorRT's spelling to the project's
_DTYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8",
    "UInt8": "uint8",
}  # fmt: skip


def checkpoint_facts(name: str) -> ArtifactRow:
    """Describe a checkpoint, which a report compares with and does not take apart."""
    return ArtifactRow(
        name=name,
        kind="checkpoint",
        precision="fp32",
        bytes=None,
        weight_bytes=None,
        sha256="",
        runs_on="PyTorch",
        fused="",
        verdict="reference",
        rows=(),
    )


def artifact_facts(path: Path, live: bool | None) -> ArtifactRow:
    """Describe an exported file; ``live`` is the verdict of a comparison that ran just now.

    Raises:
        GraphError: there is no such file, or it is none of ours.
        EngineFileError: an engine is damaged.
    """
    found = inspect(path)
    manifest, _ = believed(path)
    grid = None
    if found.kind == "onnx":
        model = io.load(path)
        io.infer_shapes(model)
        rows = tuple((f"block {row.block}", row.dtypes) for row in precision_map(model))
        grid = Grid(PARTS, rows) if rows else None
    engine = None
    if manifest is not None and manifest.engine is not None:
        engine = _engine(manifest.engine, manifest.attention.expected)
    return ArtifactRow(
        name=path.name,
        kind="TensorRT engine" if found.kind == "engine" else "ONNX graph",
        precision=found.precision or "unknown",
        bytes=found.bytes,
        weight_bytes=found.weight_bytes,
        sha256=found.sha256,
        runs_on=found.runs_on,
        fused=_fused(found),
        verdict="not believed" if found.distrusted else _verdict(manifest, live),
        rows=tuple(_rows(found, manifest)),
        command=found.command or "",
        grid=grid,
        engine=engine,
        islands=manifest.islands if manifest is not None else {},
        distrusted=found.distrusted,
    )


def _fused(found: Inspection) -> str:
    if found.attention_fused is None:
        return "unknown"
    return f"{found.attention_fused} of {found.attention_expected}"


def _verdict(manifest: Manifest | None, live: bool | None) -> VerdictWord:
    check = manifest.check if manifest is not None else None
    passed = live if live is not None else check.passed if check is not None else None
    if passed is False:
        return "failed"
    if manifest is not None and manifest.engine is not None and live is None:
        return "passed" if manifest.engine.executed and passed else "compiled, not run"
    return "not checked" if passed is None else "passed"


def _rows(found: Inspection, manifest: Manifest | None) -> list[tuple[str, str]]:
    rows = [("described by", found.described)]
    rows += [("not believed", found.distrusted)] if found.distrusted else []
    for title, specs in (("input", found.inputs), ("output", found.outputs)):
        rows += [
            (title, f"{spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]")
            for spec in specs
        ]
    rows += [
        ("batch", ", ".join(map(str, found.profiles)) or "unknown"),
        ("made by", found.made_by or "unknown"),
        ("executed", found.executed),
        ("sha256", found.sha256),
    ]
    if found.multiply_adds is not None:
        rows.append(("multiply-adds", f"{found.multiply_adds / 1e9:.2f} billion an image"))
    if found.accumulators:
        sums = ", ".join(f"{dtype} in {count}" for dtype, count in found.accumulators.items())
        rows.append(("attention sums in", f"{sums} fused attention kernels"))
    if manifest is not None:
        if manifest.source is not None:
            rows.append(("made from", f"{manifest.source.file}, sha256 {manifest.source.sha256}"))
        if manifest.quantization is not None:
            rows += [
                *quantization_rows(manifest.quantization),
                ("in short", manifest.quantization.verdict),
            ]
        rows += [("note", note) for note in manifest.notes]
    return rows


def _engine(record: EngineRecord, expected: int) -> EngineRow | None:
    if not isinstance(record.census, list) or not record.census:
        return None
    census = Census.from_json(record.census[0])
    figures = summary(census)
    return EngineRow(
        kernels=figures["kernels"],
        fused=figures["fused_attention"],
        blocks=expected,
        products={_DTYPES.get(name, name): n for name, n in figures["gemm_dtypes"].items()},
        kinds=_roles(census),
        per_block=figures["kernels_per_block"],
        layout_only=len(census.layout_only),
        closed=len(census.closed),
        weight_bytes={_DTYPES.get(name, name): n for name, n in census.weight_bytes.items()},
        strips=_strips(census),
        built_for=f"{record.backend} {record.version}, {record.targets}",
        executed="executed" if record.executed else record.reason,
    )


def role_of(kernel: Kernel) -> str:
    """Say in the field's words what a kernel does."""
    if is_fused_attention(kernel):
        return "attention"
    if is_convolution(kernel):
        return "convolution"
    if is_gemm(kernel):
        return "matrix product"
    return "layout only" if is_layout_only(kernel) else "norm and element-wise"


def _roles(census: Census) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kernel in census.kernels:
        counts[role_of(kernel)] = counts.get(role_of(kernel), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _strips(census: Census) -> tuple[tuple[str, tuple[Chip, ...]], ...]:
    """Line the kernels up by block, in order of their execution."""
    lines: dict[str, list[Chip]] = {}
    for kernel in census.kernels:
        block = "outside" if kernel.block is None else f"block {kernel.block}"
        role = role_of(kernel)
        computes = role in {"attention", "convolution", "matrix product"}
        dtype = gemm_dtype(kernel) if computes else (*kernel.outputs, "")[0]
        layers = ", ".join(kernel.layers) or kernel.name
        chip = Chip(role, _DTYPES.get(dtype, dtype), f"{role} in {dtype}: {layers}")
        lines.setdefault(block, []).append(chip)
    ordered = sorted(lines, key=lambda name: -1 if name == "outside" else int(name.split()[1]))
    return tuple((name, tuple(lines[name])) for name in ordered)


WORST = 3  # images shown of each comparison


def live_agreement(validation: Validation, verified: Verified) -> facts.AgreementRow:
    """Describe a comparison that ran for the report."""
    return facts.AgreementRow(
        candidate=short(validation.candidate.name),
        reference=short(validation.reference.name),
        live=True,
        passed=validation.passed,
        check=validation.check,
        gate=f"{validation.gate_name}: {validation.gate}, because {validation.gate.reason}",
        reasons=validation.reasons,
        cause=validation.cause,
        notes=validation.notes,
        worst=_worst(validation, verified),
    )


def _worst(validation: Validation, verified: Verified) -> tuple[facts.Worst, ...]:
    """Show the images that agree least with the neighbours that either side finds for them."""
    sample = verified.reference.sample
    if len(sample) < 3:
        return ()
    from msn_export.report.render import thumbnail

    name = next(iter(verified.vectors))
    theirs = nearest(embedding_of(verified.reference.outputs[name]))
    mine = nearest(verified.vectors[name])
    cosines = [-2.0 if i.cosine is None else i.cosine for i in validation.check.per_image]
    order = np.argsort(np.nan_to_num(cosines, nan=-2.0), kind="stable")[:WORST]

    def shown(index: int) -> facts.PageImage:
        return thumbnail(sample.names[index], sample.pixels[index])

    records = validation.check.per_image
    return tuple(
        facts.Worst(
            shown(i), records[i].cosine, records[i].max_abs, shown(theirs[i]), shown(mine[i])
        )
        for i in order.tolist()
    )


def recorded_agreement(name: str, manifest: Manifest) -> facts.AgreementRow:
    """Describe the comparison that a manifest holds: what ran when the artifact was made."""
    check = manifest.check
    assert check is not None
    gate = in_words(check.gate or GATES[manifest.dtype].numbers)
    if manifest.engine is not None and not manifest.engine.executed:
        name = f"typed graph of {name}"  # no engine agrees with anything before it ran
    return facts.AgreementRow(
        candidate=name,
        reference=_reference(manifest, check.reference),
        live=False,
        passed=check.passed,
        check=check,
        gate=f"{manifest.dtype}: {gate}",
        notes=check.notes,
    )


def _reference(manifest: Manifest, named: str) -> str:
    """Name what a manifest's check compared with: a checkpoint's graph, or a graph's engine."""
    if manifest.kind == "onnx" and manifest.checkpoint is not None:
        return f"{manifest.checkpoint.source} in PyTorch"
    return short(named.split(" in ", maxsplit=1)[0])


def drift_facts(found: Drift) -> facts.DriftRow:
    """Describe a comparison block by block."""
    return facts.DriftRow(
        candidate=short(found.candidate),
        reference=short(found.reference),
        sentence=found.sentence,
        parted=found.parted,
        stages=tuple(_stage(stage) for stage in found.stages),
        suspect=found.suspect,
        inside=tuple(_tensor(tensor) for tensor in found.inside),
        needed=HEADROOM,
        notes=found.notes,
    )


def _stage(stage: StageDrift) -> facts.Stage:
    tensor, own = stage.tensor, stage.own
    return facts.Stage(
        stage.name, tensor.cosine_min, tensor.relative, tensor.max_abs, stage.peak,
        own.allowed if own else None, own.relative if own else None, stage.headroom,
        stage.peak_tensor,
    )  # fmt: skip


def _tensor(tensor: TensorDrift) -> facts.Stage:
    return facts.Stage(
        tensor.name, tensor.cosine_min, tensor.relative, tensor.max_abs, tensor.largest
    )


def short(name: str) -> str:
    """Name a file without its folder, a checkpoint as it is."""
    return name if is_checkpoint(name) else Path(name).name
