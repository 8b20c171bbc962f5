"""Where the TensorRT runner is tested: stand-ins for each row of the loaders' table, or a GPU.

The tests see no difference. On a GPU the engines are compiled by the TensorRT that is installed,
and tensors on the GPU are torch's.
"""

import importlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export.engine.build import build_engine
from msn_export.engine.options import Backend, BuildSpec, find_backend
from msn_export.engine_header import ANY_GPU, EngineHeader, may_target, tries_any_gpu
from msn_export.errors import MissingPackageError
from msn_export.host import Device, Driver, NoDriver, find_driver
from msn_export.runtime import dlpack as libraries
from msn_export.runtime.engine import VerifiedEngine
from msn_export.runtime.tensorrt import EngineHost, TrtRunner
from msn_export.runtime.versions import VERSIONS, LoadedTensorRT, row_for
from msn_export.spec import BatchRange, ComputeCapability
from tests.builders.networks import Network
from tests.fakes.cuda_stand_in import CudaStandIn
from tests.fakes.recorder import Recorder
from tests.fakes.tensorrt_stand_in import plan_of, tensorrt_stand_in
from tests.fakes.tensors_stand_in import NAME, Library

_FOLDER = tempfile.TemporaryDirectory(prefix="msn-export-networks-")
DEVICE = Device(0, "Stand-in GPU", ComputeCapability(8, 9), 1 << 30)
ROWS = {row.contexts: row for row in reversed(VERSIONS) if row.contexts and not row.only_compatible}
AMPERE = ComputeCapability(8, 0)
BENCHES = [*ROWS, pytest.param("gpu", marks=pytest.mark.gpu)]


class Bench:
    """One place to run engines. ``is_real`` says whether there is a GPU."""

    is_real = False

    def __init__(self, contexts: str, **stand_in: Any) -> None:
        self.contexts = contexts
        self.recorder = Recorder()
        self.stand_in = CudaStandIn()
        row = ROWS[contexts]
        module = tensorrt_stand_in(self.stand_in, contexts, **stand_in)
        loaded = LoadedTensorRT(self.recorder.tensorrt(module), row, module.__version__)
        self.machine = EngineHost(self.recorder.cuda(self.stand_in), loaded, DEVICE)

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are captured by the runner."""
        return self.machine.loaded.row.captures

    def plan(self, network: Network) -> bytes:
        return plan_of(network, self.machine.loaded.version)

    def open(
        self, network: Network | None = None, *, eager_kernels: bool = False, **options: Any
    ) -> TrtRunner:
        content = self.plan(network or Network())
        header = EngineHeader(self.machine.loaded.row.backend, "", len(content))
        engine = VerifiedEngine(Path("m.engine"), content, header, None)
        return TrtRunner(engine, self.machine, eager_kernels=eager_kernels, **options)

    @cache  # noqa: B019  lives as long as the test
    def library(self) -> Any:
        return Library(self.stand_in)

    def current_stream(self, _module: Any, _device: int) -> Any:
        """Answer as torch and cupy do where they are asked for their current stream."""
        return self.library().stream_object(self.library().stream)

    def settle(self) -> None:
        """Wait for everything."""
        with self.stand_in._lock:
            self.stand_in._catch_up_all()

    def free_memory(self) -> int:
        return int(self.stand_in.cuMemGetInfo()[1])

    def problems(self) -> list[str]:
        return [*self.stand_in._problems, *self.recorder.problems]


class GpuBench(Bench):
    """The GPU of this machine and the TensorRT that is installed."""

    is_real = True

    def __init__(self) -> None:
        driver = find_driver()
        if isinstance(driver, NoDriver):
            pytest.skip(driver.reason)
        self.recorder = Recorder()
        loaded, device = _loaded(), driver.devices[0]
        if obstacle := _obstacle(device.capability):
            pytest.skip(obstacle)
        self.contexts = loaded.row.contexts
        self.cuda = pytest.importorskip("cuda.bindings.driver")
        wrapped = LoadedTensorRT(self.recorder.tensorrt(loaded.trt), loaded.row, loaded.version)
        self.machine = EngineHost(self.recorder.cuda(self.cuda), wrapped, device)

    def plan(self, network: Network) -> bytes:
        half = {kind for _, kind, _ in network.outputs} | {network.dtype}
        capability = self.machine.device.capability
        typed = _backend().row.strongly_typed
        if "bfloat16" in half and (capability < AMPERE or not typed):
            pytest.skip(f"{_backend()} has no bf16 on SM {capability}")
        return _compiled(network, capability)

    @cache  # noqa: B019  lives as long as the test
    def library(self) -> Any:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        return Torch(torch)

    def settle(self) -> None:
        torch = self.library().torch
        torch.cuda.synchronize()

    def free_memory(self) -> int:
        device = self.cuda.cuDeviceGet(0)[1]
        context = self.cuda.cuDevicePrimaryCtxRetain(device)[1]
        self.cuda.cuCtxPushCurrent(context)
        free = int(self.cuda.cuMemGetInfo()[1])
        self.cuda.cuCtxPopCurrent()
        self.cuda.cuDevicePrimaryCtxRelease(device)
        return free

    def problems(self) -> list[str]:
        return self.recorder.problems


class Torch:
    """torch, as the tests use an array library."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self._kept: dict[int, Any] = {}

    @property
    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    @stream.setter
    def stream(self, handle: int) -> None:
        cuda = self.torch.cuda  # ExternalStream(0) would be one of torch's pool
        cuda.set_stream(cuda.default_stream() if handle == 1 else cuda.ExternalStream(handle))

    def new_stream(self) -> int:
        stream = self.torch.cuda.Stream()
        self._kept[int(stream.cuda_stream)] = stream
        return int(stream.cuda_stream)

    def stream_object(self, number: int) -> Any:
        return self._kept.get(number) or self.torch.cuda.default_stream()

    def forget_stream(self, number: int) -> None:
        del self._kept[number]  # torch's streams are of a pool that is never freed

    def to_gpu(self, array: np.ndarray[Any, Any], *, offset: int = 0) -> Any:
        size = array.dtype.itemsize
        flat = self.torch.zeros(array.size + offset // size, device="cuda")
        flat = flat.to(self.torch.from_numpy(array[:0].copy()).dtype)
        flat[offset // size :] = self.torch.from_numpy(array).reshape(-1).cuda()
        return flat[offset // size :].reshape(array.shape)

    def take(self, tensor: Any) -> Any:
        return self.torch.from_dlpack(tensor)

    def copy(self, tensor: Any) -> Any:
        return tensor.clone()

    def to_host(self, tensor: Any) -> np.ndarray[Any, Any]:
        if tensor.dtype == self.torch.bfloat16:
            tensor = tensor.float()
        values: np.ndarray[Any, Any] = tensor.cpu().numpy()
        return values

    def pointer(self, tensor: Any) -> int:
        return int(tensor.data_ptr())

    def strided(self, tensor: Any) -> Any:
        return tensor[::2]


def make_bench(where: str, monkeypatch: pytest.MonkeyPatch) -> Bench:
    # what TensorRT-RTX compiles is kept there
    monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=_FOLDER.name))
    if where == "gpu":
        return GpuBench()
    bench = Bench(where)
    monkeypatch.setitem(libraries.CURRENT_STREAM, NAME, bench.current_stream)
    return bench


def one_device(device: Device = DEVICE) -> Driver:
    return Driver("13.0", (device,))


@cache
def _backend() -> Backend:
    try:
        return find_backend()
    except MissingPackageError as error:
        pytest.skip(str(error))


@cache
def _loaded() -> LoadedTensorRT:
    """Import what the commands take too, so that a process has one TensorRT."""
    module = importlib.import_module(_backend().row.module)
    row = row_for(module.__name__, module.__version__)
    assert row is not None, module.__version__
    return LoadedTensorRT(module, row, module.__version__)


def _obstacle(capability: ComputeCapability) -> str:
    """Say why nothing of these tests can run on a GPU; empty where it must."""
    if not _backend().row.targets_capabilities or tries_any_gpu():
        return ""
    if not may_target(capability):
        return (
            f"{_backend()} is for no GPU of SM {capability}; {ANY_GPU}=1 tries engines that name "
            "no target"
        )
    return "" if capability >= AMPERE else f"{_backend()} has no fp32 products on SM {capability}"


@cache
def _compiled(network: Network, capability: ComputeCapability) -> bytes:
    folder = Path(_FOLDER.name) / str(abs(hash(network)))
    folder.mkdir(exist_ok=True)
    named = _backend().row.targets_capabilities and may_target(capability)
    spec = BuildSpec(
        network.graph(folder / "m.onnx"),
        tuple(BatchRange(*profile) for profile in network.profiles),
        capabilities=(capability,) if named else (),
    )
    build_engine(spec, _backend(), folder / "m.engine")
    return (folder / "m.engine").read_bytes()
