"""Execution providers of onnxruntime: those to open with, and where a session then runs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import onnxruntime

from msn_export.errors import RunnerError, one_line
from msn_export.host import Driver, NoDriver

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_SHORT = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
# Options of a provider beside the GPU. By default CUDA's products of fp32 round to TF32: an fp32
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
    """Choose the providers to open with, in order, each with its options.

    Unasked, that is CUDA where a GPU is found and this onnxruntime knows CUDA, or where
    ``device`` names a GPU; else the CPU. ``available`` are those this onnxruntime was built with.
    """
    if isinstance(asked, str):
        raise RunnerError(f"providers is {asked!r}; give a list, as [{asked!r}]")
    if asked is None:
        on_gpu = device is not None or (isinstance(driver, Driver) and CUDA in available)
        asked = [CUDA] if on_gpu else [CPU]
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise RunnerError(f"providers is {asked!r}; give a list of names, as ['cuda', 'cpu']")
    if not asked:
        raise RunnerError(f"no provider is asked for; give one of {', '.join(_SHORT)}")
    names = list(dict.fromkeys(_SHORT.get(name, name) for name in asked))
    for name in names:
        _require_available(name, available, driver)
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
                "libraries, see 'msn-export doctor'), or ask for the provider cpu"
            )


_OPENVINO = "openvino"  # a runtime of its own: ``opening`` leads to it


def _require_available(name: str, available: Sequence[str], driver: Driver | NoDriver) -> None:
    """Require a provider to be one of this onnxruntime's; name those that can be chosen here."""
    if name in available:
        return
    short = {full: short for short, full in _SHORT.items()}
    here = [one for one in available if one not in ON_GPU or isinstance(driver, Driver)]
    names = [short.get(one, one) for one in here]
    more = "; pip install onnxruntime-gpu instead of onnxruntime" if name == CUDA else ""
    if name not in short:
        has_openvino = importlib.util.find_spec(_OPENVINO) is not None
        others = [_OPENVINO] if has_openvino and name != _OPENVINO else []
        close = difflib.get_close_matches(name.lower(), [*names, *others], 1)
        more += "".join(f", and {one} is a runtime of its own" for one in others)
        more += f"; did you mean {close[0]}?" if close else ""
    raise RunnerError(f"this onnxruntime has no provider {name!r}; it has {', '.join(names)}{more}")


def _require_device(name: str, device: int, driver: Driver | NoDriver) -> None:
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"{name} was asked for, and here: {driver.reason}; ask for the provider cpu, or run "
            "where an NVIDIA GPU is"
        )
    driver.require_index(device)


_PLUGIN = "onnxruntime_ep_cuda"  # of the packages onnxruntime-ep-cuda12 and onnxruntime-ep-cuda13


def available_providers() -> list[str]:
    """List the providers of this onnxruntime, and CUDA where a package has it as a plugin."""
    built_in: list[str] = onnxruntime.get_available_providers()
    if CUDA in built_in or importlib.util.find_spec(_PLUGIN) is None:
        return built_in
    return [CUDA, *built_in]


def load_gpu(names: Sequence[str]) -> None:
    """Load what providers on a GPU need, before a session is opened with them."""
    if not ON_GPU.intersection(names):
        return
    _preload()
    if CUDA in names and CUDA not in onnxruntime.get_available_providers():
        _load_plugin()


def _preload() -> None:
    """Load the CUDA libraries of the ``nvidia-*`` packages, which no loader path names.

    onnxruntime finds them by itself only where torch has loaded them. It prints what it misses,
    and stdout is for results; require_obtained names what then cannot be opened.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with redirect_stdout(StringIO()):
            preload()


def _load_plugin() -> None:
    """Register the CUDA provider of a plugin package, once, where none is built in.

    onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html
    """
    try:
        plugin = importlib.import_module(_PLUGIN)
        name = plugin.get_ep_name()
        if name == CUDA and CUDA not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
            onnxruntime.register_execution_provider_library(CUDA, plugin.get_library_path())
    except Exception as error:
        raise RunnerError(
            f"{_PLUGIN} is installed, and onnxruntime {onnxruntime.__version__} cannot load it: "
            f"{one_line(error)}; install the CUDA libraries it needs and an onnxruntime of its "
            "release, or ask for the provider cpu"
        ) from error
    if name != CUDA:
        raise RunnerError(
            f"{_PLUGIN} names its provider {name!r}, as early ones did; expected {CUDA!r}: update "
            "it (onnxruntime-ep-cuda13 or onnxruntime-ep-cuda12)"
        )


# Operators with which shapes are computed. onnxruntime itself leaves them on the CPU, where the
# shapes are needed; with images they have kernels in every provider.
_OF_SHAPES = frozenset(
    {
        "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal",
        "Expand", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less",
        "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd",
        "Reshape", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze",
        "Where",
    }
)  # fmt: skip


def nodes_on_cpu(session: Any) -> Mapping[str, int]:
    """Count the operators that a session runs on the CPU, by name; empty where none is recorded."""
    graphs = session.get_provider_graph_assignment_info()
    nodes = (node for graph in graphs if graph.ep_name == CPU for node in graph.get_nodes())
    return Counter(node.op_type for node in nodes)


# The first onnxruntime-gpu whose CUDA provider has a kernel for an operator of our graphs, where an
# earlier one has none: assignments of sessions over 1.24.4, 1.25.0 and 1.26.0, as
# tests/runtime/test_providers_on_cuda.py makes them.
_SINCE = {"Attention": "1.25", "QuantizeLinear": "1.26", "DequantizeLinear": "1.26"}


def require_on_gpu(on_cpu: Mapping[str, int], asked: Sequence[str], file: str) -> None:
    """Require that all but shapes is computed on the GPU, unless the CPU was asked for too."""
    heavy = {name: count for name, count in on_cpu.items() if name not in _OF_SHAPES}
    if CPU in asked or not heavy:
        return
    nodes = ", ".join(f"{count} {name}" for name, count in heavy.items())
    first = max((_SINCE[name] for name in heavy if name in _SINCE), default="")
    here = onnxruntime.__version__
    update = ""
    if first and tuple(map(int, here.split(".")[:2])) < tuple(map(int, first.split("."))):
        update = f"install onnxruntime-gpu {first} or later, or "
    raise RunnerError(
        f"{file}: onnxruntime {here} would run {nodes} on the CPU, for which {', '.join(asked)} "
        f"has no kernel; {update}allow it with the CPU as the last of the providers, as "
        "['cuda', 'cpu']"
    )
