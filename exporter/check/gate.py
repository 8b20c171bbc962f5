"""The numbers an artifact must reach, all in one place; docs/tolerances.md says where from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.errors import ToleranceError
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from msn_export.check.compare import Agreement


@dataclass(frozen=True, slots=True)
class Gate:
    """What must hold of an agreement; None asks nothing.

    ``max_abs`` is for a reference whose root mean square is 1 or less, as the final LayerNorm's
    output is before its gain; a larger reference scales it.
    """

    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_p1: float | None = None

    def failures(self, agreement: Agreement) -> list[str]:
        """Say what does not hold; each comparison is written so that NaN fails it."""
        found = []
        if agreement.nan or agreement.inf:
            found.append(f"{agreement.nan} NaN and {agreement.inf} infinite values")
        if self.max_abs is not None:
            allowed = self.max_abs * max(1.0, agreement.reference_rms)
            if not agreement.max_abs <= allowed:
                found.append(f"max_abs {agreement.max_abs:.2e}, allowed {allowed:.1e}")
        for name in ("cosine_min", "cosine_p1"):
            least = getattr(self, name)
            if least is not None and not getattr(agreement, name) >= least:
                found.append(f"{name} {getattr(agreement, name):.6f}, at least {least} needed")
        return found

    def require(self, agreement: Agreement, what: str) -> None:
        """Pass or raise.

        Raises:
            ToleranceError: something does not hold; the message has every figure that fails.
        """
        failures = self.failures(agreement)
        if failures:
            raise ToleranceError(
                f"{what} does not agree with its reference: " + "; ".join(failures)
            )


GATES = {
    Dtype.FP32: Gate(max_abs=1e-4, cosine_min=0.999999),
    Dtype.FP16: Gate(cosine_p1=0.999),
    Dtype.BF16: Gate(cosine_p1=0.999),
    # msn-export calibrate --gate-cosine; trt compares a quantised graph with itself as written
    Dtype.INT8: Gate(cosine_p1=0.99),
    Dtype.FP8: Gate(cosine_p1=0.99),
}
