"""What a benchmark's outputs are compared with: the fp32 model they came from, run once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msn_export.benchmark.contenders import Placement, torch_entry
from msn_export.benchmark.results import Agreed
from msn_export.errors import BenchError, ToleranceError
from msn_export.metrics.metrics import Comparison, worst_of
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from msn_export.benchmark.contenders import ContenderSpec
    from msn_export.benchmark.session import BenchSession


_BATCH = 4  # images the reference takes at a time: it is not what is timed


@dataclass(frozen=True, slots=True)
class BenchReference:
    """Outputs [count, ...] by name; ``checkpoint`` is the sha256 of their weights, where known."""

    name: str
    outputs: Mapping[str, NDArray[Any]]
    checkpoint: str | None = None

    def compare(
        self, entry: ContenderSpec, outputs: Mapping[str, NDArray[Any]]
    ) -> tuple[Agreed | None, str | None]:
        """Compare every output that both have; or say why none was."""
        if not self.outputs:
            return None, self.name
        record = entry.manifest.checkpoint if entry.manifest is not None else None
        own = record.sha256 if record is not None else None
        if own is not None and self.checkpoint is not None and own != self.checkpoint:
            return None, "it was made from another checkpoint than the reference"
        shared = [name for name in self.outputs if name in outputs]
        if not shared:
            return None, f"it has no output in common with the reference ({self.name})"
        found = []
        for name in shared:
            comparison = Comparison()
            try:
                comparison.add(self.outputs[name], outputs[name])
            except ToleranceError as error:
                return None, f"{name}: {error}"
            found.append(comparison.agreement())
        worst = worst_of(found)
        return Agreed(**{name: getattr(worst, name) for name in Agreed.__slots__}), None


def find_reference(arena: BenchSession, checkpoint: str | None) -> BenchReference:
    """Run the PyTorch model in fp32 on the CPU; its process is gone before anything is timed.

    Where it cannot be had, the first fp32 graph stands in, and says so.
    """
    with ExitStack() as stack:
        try:
            origin = arena.origin(checkpoint)
            cpu = Placement(arena.where.threads)
            apart = arena.beside(cpu, stack)
            one = apart.start(torch_entry("sdpa", origin, cpu, Dtype.FP32))
            outputs, _ = apart.outputs(one, _BATCH)
        except BenchError as error:
            return _first_fp32(arena, str(error).removeprefix("sdpa: "))
    return BenchReference(f"{origin.checkpoint}, {one.record.runs}, fp32", outputs, origin.sha256)


def _first_fp32(arena: BenchSession, reason: str) -> BenchReference:
    for one in arena.opened:
        if one.entry.dtype == Dtype.FP32 and one.entry.kind == "onnx":
            record = one.entry.manifest.checkpoint if one.entry.manifest is not None else None
            outputs, _ = arena.outputs(one, _BATCH)
            name = f"{one.name} (no PyTorch reference: {reason})"
            return BenchReference(name, outputs, record.sha256 if record is not None else None)
    return BenchReference(f"nothing ({reason})", {})
