"""Run an engine that was just compiled, where it can run, or say why it was not."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msn_export.check.gate import GATES
from msn_export.check.verify import Reference, verify
from msn_export.driver import NoDriver, find_driver
from msn_export.engine_header import parse_header
from msn_export.errors import MissingPackageError
from msn_export.manifest import Manifest
from msn_export.manifest_records import CheckRecord, EngineRecord
from msn_export.runtime.admission import Admitted
from msn_export.runtime.engine_opening import open_engine
from msn_export.runtime.outputs import Outputs
from msn_export.runtime.trt import TrtRunner
from msn_export.spec import InputKind


@dataclass(slots=True)
class _OnProfile:
    """A runner that uses one profile only."""

    runner: TrtRunner
    profile: int
    name: str

    def __call__(self, images: Any, /) -> Outputs:
        return self.runner(images, profile=self.profile)


def execute(
    engine: Path, manifest: Manifest, reference: Reference | None, stem: InputKind
) -> EngineRecord:
    """Run an engine at the smallest, best and largest batch of each profile and gate it.

    Args:
        engine: the staged file.
        manifest: what will be written of it.
        reference: what to compare with; None where no check was asked for.
        stem: what the engine takes.

    Returns:
        The manifest's engine record: executed, with the figures, or not, and why.

    Raises:
        ToleranceError: the engine ran and does not reach its gate.
        DeviceError: this GPU is one it is for, and it does not run.
    """
    record = manifest.engine
    assert record is not None
    content = engine.read_bytes()
    admitted = Admitted(engine, content, parse_header(content, engine), manifest)
    reason = _obstacle(admitted, reference)
    if reason or reference is None:
        return replace(record, executed=False, reason=f"compiled, not executed: {reason}")
    try:
        # TensorRT-RTX: judge the kernels that a service ends up with, not those of its first runs
        runner = open_engine(admitted, eager_kernels=True)
    except MissingPackageError as error:
        return replace(record, executed=False, reason=f"compiled, not executed: {error}")
    with runner:
        check = _check(runner, manifest, reference, stem)
    sizes = ", ".join(str(size) for size in check.batches)
    figures = f"max_abs {check.max_abs:.2e}, p1 cosine {check.cosine_p1:.6f}"
    reason = f"executed on {runner.name}, batches {sizes}: {figures}"
    return replace(record, executed=True, reason=reason, check=check)


def _obstacle(engine: Admitted, reference: Reference | None) -> str:
    """Say what keeps an engine from running here; nothing where it should run."""
    driver = find_driver()
    if isinstance(driver, NoDriver):
        return driver.reason
    if not any(engine.is_for(device) for device in driver.devices):
        here = ", ".join(f"{device.name} (SM {device.capability})" for device in driver.devices)
        return f"it is for another GPU ({engine}; here is {here})"
    return "no check was asked for (--no-check)" if reference is None else ""


def _check(
    runner: TrtRunner, manifest: Manifest, reference: Reference, stem: InputKind
) -> CheckRecord:
    """Gate every profile; the record is that of the worst, with all sizes that ran."""
    if manifest.rounds_as is not manifest.dtype:  # TF32: what was measured is fp32's
        reference = replace(reference, exact={}, rounding={}, baseline={})
    records = []
    for index, profile in enumerate(runner.profiles):
        sizes = sorted({profile.min, profile.opt, profile.max})
        on_profile = _OnProfile(runner, index, f"{runner.name}, profile {profile}")
        verified = verify(on_profile, reference, stem, sizes)
        records.append(
            verified.require(GATES[manifest.rounds_as], f"the engine, run in profile {profile}")
        )
    worst = min(records, key=lambda record: record.cosine_min or 0.0)
    every = sorted({size for record in records for size in record.batches})
    return replace(worst, batches=tuple(every))
