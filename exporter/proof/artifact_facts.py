"""What a report says of one artifact, from the file, its manifest and its graph."""

from __future__ import annotations

from pathlib import Path

from msn_export.engine.census import Census, summary
from msn_export.engine.kernels import Kernel
from msn_export.engine.roles import (
    gemm_dtype,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
)
from msn_export.graph import io
from msn_export.graph.precision_map import PARTS, precision_map
from msn_export.manifest import Manifest
from msn_export.manifest_records import EngineRecord
from msn_export.proof.inspection import Inspection, believed, inspect
from msn_export.proof.quantization_rows import quantization_rows
from msn_export.report.facts import Artifact, Chip, Engine, Grid, Verdict

# TensorRT's spelling to the project's
_DTYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8",
    "UInt8": "uint8",
}  # fmt: skip


def checkpoint_facts(name: str) -> Artifact:
    """Describe a checkpoint, which a report compares with and does not take apart."""
    return Artifact(
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


def artifact_facts(path: Path, live: bool | None) -> Artifact:
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
    return Artifact(
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


def _verdict(manifest: Manifest | None, live: bool | None) -> Verdict:
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


def _engine(record: EngineRecord, expected: int) -> Engine | None:
    if not isinstance(record.census, list) or not record.census:
        return None
    census = Census.from_json(record.census[0])
    figures = summary(census)
    return Engine(
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
