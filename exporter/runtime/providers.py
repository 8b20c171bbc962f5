"""onnxruntime's execution providers: what was asked for is obtained, or it is an error."""

from collections.abc import Sequence
from typing import Any

from msn_export.errors import RunnerError
from msn_export.host import Driver, NoDriver

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_SHORT = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# What a provider is told beside the GPU. Unasked, CUDA's products of fp32 round to TF32: an fp32
# graph would not reproduce its golden input.
_OPTIONS = {CUDA: {"use_tf32": "0"}}
# Providers whose tensors may stay on the GPU; each takes a device_id
ON_GPU = frozenset({CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"})


def choose(
    asked: Sequence[str] | None,
    device: int | None,
    available: Sequence[str],
    driver: Driver | NoDriver,
) -> list[tuple[str, dict[str, Any]]]:
    """Name the providers to open with, in order, each with its options.

    Unasked, that is CUDA where a GPU is found and this onnxruntime knows CUDA, or where
    ``device`` names a GPU; else the CPU.

    Args:
        asked: short or full names, in order.
        device: the GPU's index.
        available: what this onnxruntime was built with.
        driver: what drives a GPU here.
    """
    if isinstance(asked, str):
        raise RunnerError(f"providers is {asked!r}; give a list, as [{asked!r}]")
    if asked is None:
        on_gpu = device is not None or (isinstance(driver, Driver) and CUDA in available)
        asked = [CUDA] if on_gpu else [CPU]
    if not asked:
        raise RunnerError(f"no provider is asked for; give one of {', '.join(_SHORT)}")
    names = [_SHORT.get(name, name) for name in asked]
    for name in names:
        _require_available(name, available)
        if name in ON_GPU:
            _require_device(name, device or 0, driver)
    if device is not None and not ON_GPU.intersection(names):
        raise RunnerError(
            f"device {device} is a GPU and the providers asked for ({', '.join(asked)}) use none; "
            "leave device out, or ask for cuda"
        )
    return [
        (name, {"device_id": device or 0, **_OPTIONS.get(name, {})} if name in ON_GPU else {})
        for name in names
    ]


def require_obtained(asked: Sequence[str], obtained: Sequence[str], file: str) -> None:
    """Require that onnxruntime uses every provider: it leaves out what it fails to load."""
    for name in asked:
        if name not in obtained:
            raise RunnerError(
                f"{file}: {name} was asked for and onnxruntime could not load it (it runs on "
                f"{', '.join(obtained)}); install what it needs (for CUDA: cuDNN and the CUDA "
                "libraries, see 'msn-export doctor'), or ask for providers=['cpu']"
            )


def _require_available(name: str, available: Sequence[str]) -> None:
    if name not in available:
        short = {full: short for short, full in _SHORT.items()}
        known = ", ".join(short.get(one, one) for one in available)
        hint = "; pip install onnxruntime-gpu instead of onnxruntime" if name == CUDA else ""
        raise RunnerError(f"this onnxruntime has no provider {name!r}; it has {known}{hint}")


def _require_device(name: str, device: int, driver: Driver | NoDriver) -> None:
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"{name} was asked for, and here: {driver.reason}; ask for providers=['cpu'], or run "
            "where an NVIDIA GPU is"
        )
    require_index(device, driver)


def require_index(device: int, driver: Driver) -> None:
    """Require a GPU of that index."""
    if not 0 <= device < len(driver.devices):
        names = ", ".join(f"{one.index}: {one.name}" for one in driver.devices)
        raise RunnerError(f"device {device} does not exist; here are {names}")
