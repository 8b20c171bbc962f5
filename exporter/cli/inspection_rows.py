"""An inspection as lines that a person reads."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from msn_export.cli.console import Console
from msn_export.proof.inspection import Inspection
from msn_export.records import to_plain
from msn_export.spec import TensorSpec


def show_inspections(console: Console, found: list[Inspection]) -> None:
    """Print one artifact, or two side by side with what differs marked."""
    if console.as_json:
        plain: list[Any] = [{**to_plain(one), "other_bytes": one.other_bytes} for one in found]
        console.print_json(plain[0] if len(plain) == 1 else {"artifacts": plain})
        return
    described = [dict(rows(one)) for one in found]
    names = list(dict.fromkeys(name for one in described for name in one))
    table = Table("", *(escape(one.file) for one in found), show_lines=len(found) > 1)
    for name in names:
        cells = [one.get(name, "-") for one in described]
        title = f"[bold]{name} ≠[/]" if len(set(cells)) > 1 else name
        table.add_row(title, *(escape(cell) for cell in cells))
    console.print(table)


def rows(found: Inspection) -> Iterator[tuple[str, str]]:
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
