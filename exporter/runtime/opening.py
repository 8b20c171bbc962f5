"""From a path to a runner: which one. What a graph or an engine needs is imported for it alone.

Loading an engine runs what is in it. So nothing of TensorRT is touched before the file was found to
be the one its manifest describes, and a driver was found.
"""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export import manifest as manifests
from msn_export.engine_header import EngineHeader, may_target, parse_header, tries_any_gpu
from msn_export.errors import ManifestError, MissingPackageError, RunnerError
from msn_export.host import Device, Driver, NoDriver, find_driver
from msn_export.manifest import Manifest, manifest_path
from msn_export.runtime.tensorrt import EngineFile, EngineHost, TrtRunner
from msn_export.runtime.versions import INSTALL, LoadedTensorRT, load, may_run
from msn_export.spec import ComputeCapability, Targets

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from msn_export.runtime.runner import Runner
    from msn_export.runtime.versions import CudaDriver


def open_runner(  # noqa: PLR0913  each names one thing a service may have to choose
    path: str | os.PathLike[str],
    *,
    device: int | None = None,
    providers: Sequence[str] | None = None,
    trust: bool = False,
    threads: int | None = None,
    contexts: int = 2,
    cuda_graphs: bool = True,
    eager_kernels: bool = False,
) -> Runner:
    """Load an artifact and make it ready to run.

    An ``.onnx`` file runs in onnxruntime, an engine in the TensorRT that its manifest names.

    Args:
        path: an ``.onnx`` file or an engine, with its manifest beside it.
        device: index of the GPU; by default the first that fits.
        providers: onnxruntime's, in order: ``cpu``, ``cuda``, ``tensorrt`` or in full. By default
            CUDA where a GPU is found, else the CPU. What is asked for and cannot be had is an
            error.
        trust: load an engine that has no manifest. An engine runs what is in it.
        threads: onnxruntime on the CPU: threads that one call computes with.
        contexts: an engine: calls that run at the same time, each with its own memory.
        cuda_graphs: an engine: replay runs that come up again as CUDA graphs.
        eager_kernels: an engine of TensorRT-RTX: compile the kernels of a batch size before its
            first run, which then takes seconds. By default that happens behind runs that use
            general kernels: later runs are faster, and round otherwise, than the first.

    Raises:
        RunnerError: the artifact does not exist, or cannot run here; the message says what would.
        ManifestError: it is not what its manifest says, or has none and is not trusted.
        EngineFileError: an engine is damaged.
        GraphError: an ONNX graph is refused.
        MissingPackageError: a package is not installed; the message has the line that does.
        DeviceError: the GPU or TensorRT failed.
    """
    from pathlib import Path  # a third of what importing this module would take

    file = Path(path)
    if not file.is_file():
        raise RunnerError(f"{file} does not exist; give an .onnx file or an engine")
    if file.suffix == ".onnx":
        return _open_graph(file, device, providers, threads)
    if providers is not None:
        raise RunnerError(f"engine {file} takes no providers; it runs in the TensorRT it is for")

    return open_engine(
        verify_engine_file(file, trust=trust),
        device,
        contexts=contexts,
        cuda_graphs=cuda_graphs,
        eager_kernels=eager_kernels,
    )


def _open_graph(
    file: Path, device: int | None, providers: Sequence[str] | None, threads: int | None
) -> Runner:
    from msn_export import manifest as manifests

    manifest = manifests.read(file)
    if manifest is not None and manifest.kind != "onnx":
        raise ManifestError(
            f"{manifests.manifest_path(file)} describes no graph; export {file} again"
        )
    try:
        from msn_export.runtime.onnxruntime import OrtRunner
    except ImportError as error:
        raise MissingPackageError(
            f"onnxruntime cannot be imported ({error}); pip install 'msn-export[ort]'"
        ) from error
    return OrtRunner(file, providers, device=device, threads=threads, manifest=manifest)


@dataclass(frozen=True, slots=True)
class VerifiedEngine:
    """An engine that is what its manifest says, or is trusted without one."""

    path: Path
    content: bytes
    header: EngineHeader
    manifest: Manifest | None

    @property
    def compatible(self) -> bool:
        """Whether it was built to load in later versions of TensorRT too."""
        record = self.manifest.engine if self.manifest is not None else None
        return record is not None and bool(record.options.get("version_compatible"))

    @property
    def version(self) -> str:
        """The version it was built with."""
        record = self.manifest.engine if self.manifest is not None else None
        return record.version if record is not None else self.header.version

    @property
    def targets(self) -> Targets:
        """The GPU generations it is for; none where neither file nor manifest tells."""
        record = self.manifest.engine if self.manifest is not None else None
        return self.header.targets if self.header.targets or not record else record.targets

    def is_for(self, device: Device) -> bool:
        """Tell whether it is for a GPU."""
        if not self.targets or device.capability in self.targets:
            return True
        # one that names no target: its kernels are made on the GPU
        late = self.targets.later and device.capability > min(self.targets.named)
        return late and tries_any_gpu()

    def __str__(self) -> str:
        gpus = f" for {self.targets}" if self.targets else ""
        return f"{self.header.backend} {self.version}{gpus}"


def verify_engine_file(path: Path, *, trust: bool) -> VerifiedEngine:
    """Read an engine once, and require it to be what its manifest says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunnerError(f"engine {path} cannot be read: {error.strerror}") from error
    manifest = manifests.read(path, content)
    if manifest is None and not trust:
        raise ManifestError(
            f"engine {path} has no manifest ({manifest_path(path).name} is missing), and loading "
            "an engine runs what is in it; copy the manifest that 'msn-export trt' wrote, or pass "
            "trust=True if you know where the engine comes from"
        )
    if manifest is not None and (manifest.kind != "engine" or manifest.engine is None):
        raise ManifestError(f"{manifest_path(path)} describes no engine; export {path} again")
    header = parse_header(content, path)
    record = manifest.engine if manifest is not None else None
    if record is not None and record.backend != header.backend:
        raise ManifestError(
            f"{path} is an engine of {header.backend}, and its manifest says {record.backend}; "
            f"{rebuild(manifest)}"
        )
    return VerifiedEngine(path, content, header, manifest)


def require_device(engine: VerifiedEngine, driver: Driver | NoDriver, device: int | None) -> Device:
    """Choose the GPU: the one asked for, or the first that the engine is for."""
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"engine {engine.path} ({engine}) needs an NVIDIA GPU, and here: {driver.reason}; run "
            "its .onnx with providers=['cpu'], or this where the GPU is"
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
    """Require a TensorRT that loads the engine."""
    if not may_run(loaded, engine.version, compatible=engine.compatible):
        raise RunnerError(
            f"engine {engine.path} was built with {engine}; here is {loaded}, which does not load "
            f"it; {rebuild(engine.manifest, device.capability)}"
        )


def rebuild(manifest: Manifest | None, capability: ComputeCapability | None = None) -> str:
    """Give the command that builds an engine for here, from what the manifest says."""
    if manifest is None or manifest.engine is None or manifest.source is None:
        return "build it again here with: msn-export trt MODEL.onnx"
    backend, targeted = manifest.engine.backend, manifest.engine.backend == "tensorrt-rtx"
    if targeted and capability is not None and not may_target(capability):
        # a data-centre GPU: no engine of TensorRT-RTX is for it
        backend, targeted = "tensorrt", False
    words = ["msn-export trt", shlex.quote(manifest.source.file)]
    if not manifest.dtype.is_quantised:  # the graph is, and says so
        words.append(f"--{manifest.dtype}")
    words += ["--backend", shlex.quote(backend)]
    if targeted and capability is not None:
        words += ["--compute-capability", str(capability)]
    for profile in manifest.profiles:
        words += ["--batch", str(profile)]
    flags = (name for name, value in manifest.engine.options.items() if value is True)
    # a name is a stranger's word, which is not to become another command
    words += [f"--{name.replace('_', '-')}" for name in flags if name.isidentifier()]
    return "rebuild it with: " + " ".join([*words, "--force"])


def open_engine(
    engine: VerifiedEngine,
    device: int | None = None,
    *,
    contexts: int = 2,
    cuda_graphs: bool = True,
    eager_kernels: bool = False,
) -> TrtRunner:
    """Load an engine that was admitted."""
    chosen = require_device(engine, find_driver(), device)
    cuda = load_cuda(engine.header.backend)
    loaded = load(engine.header.backend, compatible=engine.compatible)
    require_version(engine, loaded, chosen)
    plan = EngineFile(
        engine.content, engine.path.name, engine.manifest, engine.compatible, eager_kernels
    )
    machine = EngineHost(cuda, loaded, chosen)
    return TrtRunner(plan, machine, contexts=contexts, cuda_graphs=cuda_graphs)


def load_cuda(backend: str) -> CudaDriver:
    """Import the bindings of CUDA's driver API."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingPackageError(f"cuda-bindings is not installed; {INSTALL[backend]}") from error
