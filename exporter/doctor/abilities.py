"""What each command needs, and whether it is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.driver import Driver, NoDriver

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from msn_export.doctor.findings import Finding
    from msn_export.doctor.packages import Wanted

COMPILER = "a C++ compiler"


@dataclass(frozen=True, slots=True)
class Ability:
    """Something a command does; ``extras``, ``tool`` and ``gpu`` are what it needs for that."""

    command: str
    does: str
    extras: tuple[str, ...] = ()
    gpu: bool = False
    tool: str | None = None


ABILITIES = (
    Ability("onnx", "checkpoint to ONNX graph", ("export",)),
    Ability("trt", "compile with TensorRT-RTX", ("graph", "rtx")),
    Ability("trt", "compile with TensorRT", ("graph", "tensorrt"), gpu=True),
    Ability("calibrate", "fp32 graph to int8 or fp8", ("graph",)),
    Ability("validate", "compare two graphs or engines", ("graph",)),
    Ability("validate", "compare with a checkpoint", ("export",)),
    Ability("drift", "compare block by block", ("graph",)),
    Ability("drift", "compare with a checkpoint", ("export",)),
    Ability("report", "write a page", ("graph", "report")),
    Ability("inspect", "read any artifact", ("graph",)),
    Ability("bench", "time an .onnx file", ("ort",)),
    Ability("bench", "against PyTorch", ("export",)),
    Ability("bench", "--against compile", ("export",), tool=COMPILER),
    Ability("bench", "--report", ("ort", "report")),
    Ability("bench", "time an engine of TensorRT-RTX", ("ort", "rtx"), gpu=True),
    Ability("bench", "time an engine of TensorRT", ("ort", "tensorrt"), gpu=True),
    Ability("embed", "an .onnx file", ("ort",)),
    Ability("embed", "an .onnx file on a GPU", ("ort",), gpu=True),
    Ability("embed", "an engine of TensorRT-RTX", ("ort", "rtx"), gpu=True),
    Ability("embed", "an engine of TensorRT", ("ort", "tensorrt"), gpu=True),
    Ability("embed", "to .parquet", ("ort", "parquet")),
    Ability("triton", "write or check a model repository", ("graph", "triton")),
    Ability("doctor", "this"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a command can do something here; ``mend`` is what it takes where it cannot."""

    command: str
    does: str
    works: bool
    mend: str


def judge(
    commands: Iterable[str],
    packages: Sequence[Wanted],
    faults: Sequence[Finding],
    driver: Driver | NoDriver,
    tools: Mapping[str, str | None],
) -> tuple[Verdict, ...]:
    """Judge everything the commands do.

    Args:
        commands: those that there are, in order.
        packages: what the extras ask for and what is installed.
        faults: what is installed and broken.
        driver: of the GPU.
        tools: of each tool that an ability names, the line that installs it; None where it is here.
    """
    verdicts = []
    for command in commands:
        for ability in (row for row in ABILITIES if row.command == command):
            needs = list(_needs(ability, packages, faults, driver, tools))
            verdicts.append(Verdict(command, ability.does, not needs, "; ".join(needs)))
    return tuple(verdicts)


def _needs(
    ability: Ability,
    packages: Sequence[Wanted],
    faults: Sequence[Finding],
    driver: Driver | NoDriver,
    tools: Mapping[str, str | None],
) -> Iterator[str]:
    missing = [
        extra
        for extra in ability.extras
        if any(extra in package.extras and package.version is None for package in packages)
    ]
    if missing:
        yield f"pip install 'msn-export[{','.join(missing)}]'"
    broken = {fault.package: fault.mend for fault in faults}
    for package in packages:
        if package.name in broken and set(package.extras) & {*ability.extras, ""}:
            yield broken[package.name]
    if ability.gpu and isinstance(driver, NoDriver):
        yield "an NVIDIA GPU with its driver"
    for package in packages:
        if ability.gpu and package.stand_in == "onnxruntime" and "ort" in ability.extras:
            yield "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    if ability.tool is not None and (line := tools.get(ability.tool)) is not None:
        yield line
