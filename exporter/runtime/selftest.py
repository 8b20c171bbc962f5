"""Does this machine compute what the reference computed when the artifact was made?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from msn_export import golden
from msn_export.errors import ManifestError
from msn_export.manifest import Manifest
from msn_export.metrics.metrics import Agreement, Comparison, Errors
from msn_export.metrics.tolerances import GATES, Gate, Limit
from msn_export.spec import InputFormat


@dataclass(frozen=True, slots=True)
class SelfTest:
    """How an artifact did on its golden input; ``failures`` is empty where it passed.

    ``limit`` is what its relative error may be, as it was measured when the artifact was made; None
    holds the gate's own numbers against it.
    """

    output: str
    agreement: Agreement
    gate: Gate
    failures: tuple[str, ...]
    executed_on: str
    reference: str
    limit: float | None = None

    @property
    def passed(self) -> bool:
        """Whether every figure reached its gate."""
        return not self.failures

    def __str__(self) -> str:
        word = "passed" if self.passed else f"failed ({'; '.join(self.failures)})"
        found = self.agreement
        allowed = "" if self.limit is None else f" ({self.limit:.1e} allowed)"
        return (
            f"selftest {word}: output {self.output!r} of {found.images} seeded images on "
            f"{self.executed_on}, relative error {found.relative:.1e}{allowed}, cosine "
            f"{found.cosine_min:.6f}, against {self.reference}"
        )


def selftest(
    run: Callable[[Any], Mapping[str, Any]],
    name: str,
    manifest: Manifest | None,
    input_format: InputFormat,
) -> SelfTest:
    """Run the manifest's golden input and compare with the golden values.

    Raises:
        ManifestError: there is no manifest, or none with a golden input, or it is damaged.
    """
    record = manifest.golden if manifest is not None else None
    if manifest is None or record is None or manifest.preprocessing is None:
        raise ManifestError(
            f"{'there is no manifest with a' if manifest is None else manifest.output + ' has no'} "
            "golden input to test with; export again, without --no-check"
        )
    wanted = golden.values_of(record)
    outputs = run(golden.input_of(record, manifest.preprocessing, input_format))
    if record.output not in outputs:
        raise ManifestError(
            f"the manifest's golden output {record.output!r} is none of the artifact's; "
            "export it again"
        )
    comparison = Comparison()
    comparison.add(wanted, golden.vectors(np.asarray(outputs[record.output])))
    agreement, gate = comparison.agreement(), GATES[manifest.rounds_as]
    limit = None if record.limit is None else Limit(Errors.uniform(record.limit))
    failures = tuple(gate.failures(agreement, limit))
    return SelfTest(record.output, agreement, gate, failures, name, record.reference, record.limit)
