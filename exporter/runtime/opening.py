"""Opening of artifacts. The packages of a graph or an engine are imported for it alone.

Loading an engine runs what is in it. So nothing of TensorRT is touched before the file was found to
be the one its manifest describes, and a driver was found.
"""

from __future__ import annotations

import importlib
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msn_export import manifest as manifests
from msn_export.errors import ManifestError, MissingPackageError, RunnerError
from msn_export.host import Device, Driver, NoDriver, find_driver
from msn_export.hub_folder import GRAPHS, graph_in
from msn_export.manifest import Manifest, manifest_path
from msn_export.onnx_header import GraphMetadata
from msn_export.runtime.engine import VerifiedEngine, rebuild, verify_engine_file
from msn_export.runtime.runner import Runner
from msn_export.runtime.tensorrt import EngineHost, TrtRunner
from msn_export.runtime.versions import INSTALL, CudaDriver, LoadedTensorRT, load, may_run
from msn_export.spec import Dtype


def open_runner(  # noqa: PLR0913  each names one thing a service may have to choose
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | str | None = None,
    device: int | None = None,
    providers: Sequence[str] | None = None,
    trust: bool = False,
    threads: int | None = None,
    contexts: int = 2,
    cuda_graphs: bool = True,
    eager_kernels: bool = False,
    precision: str | None = None,
    hint: str | None = None,
) -> Runner:
    """Load an artifact and make it ready to run.

    An ``.onnx`` file runs in onnxruntime or OpenVINO, an engine in the TensorRT that its manifest
    names.

    Args:
        path: an ``.onnx`` file or an engine, with its manifest beside it, or a folder that
            ``msn-export hub`` wrote. Of a graph without a manifest labels and preprocessing are
            read from the file itself, which no hash seals.
        dtype: of a folder's graphs: ``fp32``, ``fp16`` or ``int8``. By default fp16 on a GPU and
            int8 on a CPU, where the folder has them, else fp32.
        device: index of the GPU; by default the first that fits.
        providers: onnxruntime's, in order: ``cpu``, ``cuda``, ``tensorrt`` or in full. By default
            CUDA where a GPU is found, else the CPU. What is asked for and cannot be had is an
            error. ``openvino`` alone runs the graph in OpenVINO, on the CPU.
        trust: load an engine that has no manifest. An engine runs what is in it.
        threads: onnxruntime on the CPU, and OpenVINO: threads that it computes with.
        contexts: an engine: calls that run at the same time, each with its own memory.
        cuda_graphs: an engine: replay runs that come up again as CUDA graphs.
        eager_kernels: an engine of TensorRT-RTX: compile the kernels of a batch size before its
            first run, which then takes seconds. By default that happens behind runs that use
            general kernels: later runs are faster, and round otherwise, than the first.
        precision: OpenVINO: what an fp32 graph is computed in, ``fp32`` (default) or ``bf16``,
            which the selftest holds to bf16's gate.
        hint: OpenVINO: ``latency`` (default) gives a call all threads, ``throughput`` divides them
            among several calls.

    Raises:
        RunnerError: the artifact does not exist, or cannot run here; the message says what would.
        ManifestError: it is not what its manifest says, or has none and is not trusted.
        EngineFileError: an engine is damaged.
        GraphError: an ONNX graph is refused.
        MissingPackageError: a package is not installed; the message has the line that does.
        DeviceError: the GPU or TensorRT failed.
    """
    file = _require_file(path)
    device = require_whole("device", device, at_least=0)
    threads = require_whole("threads", threads, at_least=1, at_most=_MOST_THREADS)
    contexts = require_whole("contexts", contexts, at_least=1) or 1
    if file.is_dir():
        file = _graph_in(file, dtype, device, providers)
    elif dtype is not None:
        raise RunnerError(f"dtype chooses among a folder's graphs; leave it out for {file}")
    if file.suffix == ".onnx":
        if isinstance(providers, Sequence) and OPENVINO in providers:
            return _open_in_openvino(file, device, providers, threads, precision, hint)
        _require_unasked(precision=precision, hint=hint)
        return _open_graph(file, device, providers, threads)
    _require_unasked(precision=precision, hint=hint)
    if providers is not None:
        raise RunnerError(f"engine {file} takes no providers; it runs in the TensorRT it is for")

    return open_engine(
        verify_engine_file(file, trust=trust),
        device,
        contexts=contexts,
        cuda_graphs=cuda_graphs,
        eager_kernels=eager_kernels,
    )


OPENVINO = "openvino"  # a runtime of its own, no provider of onnxruntime's
_MOST_THREADS = 4096  # of a call; onnxruntime starts them all


def _require_unasked(**options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise RunnerError(
                f"{name} is for OpenVINO: add the provider {OPENVINO}, or leave {name} out"
            )


def _require_file(path: str | os.PathLike[str]) -> Path:
    hint = "give an .onnx file or an engine"
    try:
        file = Path(path)
    except TypeError as error:
        raise RunnerError(f"path is a {type(path).__name__}; {hint}, as text or a Path") from error
    try:
        if file.is_file() or (file / "onnx").is_dir():
            return file
        exists = file.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise RunnerError(f"{file} cannot be opened: {error.strerror}; {hint}") from error
    if not str(path):
        raise RunnerError(f"the path is empty; {hint}")
    if exists:
        what = "a folder" if file.is_dir() else "no regular file"
        raise RunnerError(f"{file} is {what}; {hint}")
    raise RunnerError(f"{file} does not exist; {hint}")


def require_whole(
    name: str, value: Any, *, at_least: int, at_most: int | None = None
) -> int | None:
    """Require an argument to be a whole number in a range, or None."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if isinstance(value, bool) or number < at_least or number > (at_most or number):
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise RunnerError(f"{name} is {value!r}; expected a whole number {limits}")
    return number


def _stated(file: Path) -> tuple[Manifest | None, GraphMetadata | None]:
    """Read what describes a graph: the manifest, else the file itself."""
    stated = manifests.read_stated(file)
    if isinstance(stated, GraphMetadata):
        return None, stated
    if stated is not None and stated.kind != "onnx":
        raise ManifestError(f"{manifest_path(file)} describes no graph; export {file} again")
    return stated, None


def _graph_in(
    folder: Path, dtype: Dtype | str | None, device: int | None, providers: Sequence[str] | None
) -> Path:
    """Choose a folder's graph by where it will run."""
    if dtype is not None and dtype not in GRAPHS:
        raise RunnerError(f"dtype is {dtype!r}; expected one of {', '.join(GRAPHS)}")
    wanted, on_gpu = Dtype(dtype) if dtype is not None else None, False
    if not (isinstance(providers, Sequence) and OPENVINO in providers):
        _require_onnxruntime()
        from msn_export.runtime.providers import ON_GPU, available_providers, choose

        chosen = choose(providers, device, available_providers(), find_driver())
        on_gpu = chosen[0][0] in ON_GPU
    return graph_in(folder, wanted, on_gpu=on_gpu)


def _require_onnxruntime() -> None:
    try:
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            f"onnxruntime cannot be imported ({error}); pip install 'msn-export[ort]'"
        ) from error


def _open_graph(
    file: Path, device: int | None, providers: Sequence[str] | None, threads: int | None
) -> Runner:
    manifest, metadata = _stated(file)
    _require_onnxruntime()
    from msn_export.runtime.onnxruntime import OrtRunner

    return OrtRunner(
        file, providers, device=device, threads=threads, manifest=manifest, metadata=metadata
    )


def _open_in_openvino(
    file: Path,
    device: int | None,
    providers: Sequence[str],
    threads: int | None,
    precision: str | None,
    hint: str | None,
) -> Runner:
    if list(providers) != [OPENVINO]:
        raise RunnerError(
            f"providers is {providers!r}; OpenVINO runs a graph alone: choose the "
            f"provider {OPENVINO}"
        )
    if device is not None:
        raise RunnerError(f"device {device} is a GPU, and OpenVINO runs on the CPU; leave it out")
    manifest, metadata = _stated(file)
    try:
        from msn_export.runtime.openvino import OpenVinoOptions, OpenVinoRunner
    except ImportError as error:
        raise MissingPackageError(
            f"OpenVINO cannot be imported ({error}); pip install 'msn-export[openvino]'"
        ) from error
    options = OpenVinoOptions.of(precision, hint, threads)
    return OpenVinoRunner(file, options, manifest=manifest, metadata=metadata)


def require_device(engine: VerifiedEngine, driver: Driver | NoDriver, device: int | None) -> Device:
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"engine {engine.path} ({engine}) needs an NVIDIA GPU, and here: {driver.reason}; run "
            "its .onnx with the provider cpu, or this where the GPU is"
        )
    if device is not None:
        driver.require_index(device)
    wanted = driver.devices if device is None else (driver.devices[device],)
    fitting = [one for one in wanted if engine.is_for(one)]
    if not fitting:
        here = ", ".join(f"{one.name} (SM {one.capability})" for one in wanted)
        raise RunnerError(
            f"engine {engine.path} was built with {engine}; here is {here}; "
            f"{rebuild(engine.manifest, wanted[0].capability)}"
        )
    return fitting[0]


def require_version(engine: VerifiedEngine, loaded: LoadedTensorRT, device: Device) -> None:
    if not may_run(loaded, engine.version, compatible=engine.compatible):
        raise RunnerError(
            f"engine {engine.path} was built with {engine}; here is {loaded}, which does not load "
            f"it; {rebuild(engine.manifest, device.capability)}"
        )


def open_engine(
    engine: VerifiedEngine,
    device: int | None = None,
    *,
    contexts: int = 2,
    cuda_graphs: bool = True,
    eager_kernels: bool = False,
) -> TrtRunner:
    chosen = require_device(engine, find_driver(), device)
    cuda = load_cuda(engine.header.backend)
    loaded = load(engine.header.backend, compatible=engine.compatible)
    require_version(engine, loaded, chosen)
    return TrtRunner(
        engine,
        EngineHost(cuda, loaded, chosen),
        contexts=contexts,
        cuda_graphs=cuda_graphs,
        eager_kernels=eager_kernels,
    )


def load_cuda(backend: str) -> CudaDriver:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingPackageError(f"cuda-bindings is not installed; {INSTALL[backend]}") from error
