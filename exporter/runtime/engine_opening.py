"""From an admitted engine to its runner: a GPU it is for, and the modules that run it there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from msn_export.driver import find_driver
from msn_export.errors import MissingPackageError
from msn_export.runtime.admission import Admitted, require_device, require_version
from msn_export.runtime.loaders import INSTALL, load
from msn_export.runtime.trt import Machine, Plan, TrtRunner

if TYPE_CHECKING:
    from msn_export.runtime.bindings import CudaDriver


def open_engine(
    engine: Admitted,
    device: int | None = None,
    *,
    contexts: int = 2,
    cuda_graphs: bool = True,
    eager_kernels: bool = False,
) -> TrtRunner:
    """Load an engine that was admitted.

    Raises:
        RunnerError: it cannot run here.
        MissingPackageError: a package is not installed.
        DeviceError: the GPU or TensorRT failed.
    """
    chosen = require_device(engine, find_driver(), device)
    cuda = load_cuda(engine.header.backend)
    loaded = load(engine.header.backend, compatible=engine.compatible)
    require_version(engine, loaded, chosen)
    plan = Plan(engine.content, engine.path.name, engine.manifest, engine.compatible, eager_kernels)
    machine = Machine(cuda, loaded, chosen)
    return TrtRunner(plan, machine, contexts=contexts, cuda_graphs=cuda_graphs)


def load_cuda(backend: str) -> CudaDriver:
    """Import the bindings of CUDA's driver API.

    Raises:
        MissingPackageError: they are not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingPackageError(f"cuda-bindings is not installed; {INSTALL[backend]}") from error
