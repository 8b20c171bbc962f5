"""ONNX files in OpenVINO on the CPU.

OpenVINO itself would compute in bf16 where the processor has it, and pin its threads to the first
cores, where those of another process may be pinned too. Here it does neither unless it is asked.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import (
    DeviceError,
    GraphError,
    InputError,
    MsnExportError,
    RunnerError,
    one_line,
)
from msn_export.manifest import Manifest, sha256_of
from msn_export.onnx_header import GraphMetadata
from msn_export.onnx_loops import require_bounded_loops
from msn_export.runtime import dlpack
from msn_export.runtime.batches import profiles_of, run_in_chunks
from msn_export.runtime.dlpack import OF_ONNX, take_back
from msn_export.runtime.model_cache import ModelCache, cache_path
from msn_export.runtime.runner import Outputs, Precision, Runner, element_of, require_fit
from msn_export.spec import Dtype, TensorSpec
from msn_export.version_table import Client, too_old

Hint: TypeAlias = Literal["latency", "throughput"]
HINTS: tuple[Hint, ...] = get_args(Hint)

_TELEMETRY = "openvino_telemetry"


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports each import over the network.

    Where ``openvino_telemetry`` cannot be imported, OpenVINO has a stub in its place.
    """
    if _TELEMETRY in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]


openvino = _import_openvino()
VERSION: str = openvino.__version__.partition("-")[0]

# openvino.Type.get_type_name() -> ONNX's name
_ONNX_NAMES = {
    "f32": "float", "f16": "float16", "bf16": "bfloat16", "f64": "double", "u8": "uint8",
    "i8": "int8", "i32": "int32", "i64": "int64", "boolean": "bool",
}  # fmt: skip
_TYPES = {onnx: name for name, onnx in _ONNX_NAMES.items()}

# Precisions that an fp32 graph may be computed in: OpenVINO's name, and the mode that allows no
# less, or chooses kernels by their speed
PRECISIONS: Mapping[Dtype, tuple[str, str]] = {
    Dtype.FP32: ("f32", "ACCURACY"),
    Dtype.BF16: ("bf16", "PERFORMANCE"),
}

# Layers of a compiled model that multiply matrices; those of attention are fused into a subgraph
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})
_ATTENTION = frozenset({"Subgraph", "ScaledDotProductAttention", "MHA"})
_DTYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


def read_precision(compiled: Any, quantised: int | None) -> Precision:
    """Read back what a compiled model computes its products in.

    Args:
        compiled: the compiled model.
        quantised: products that the graph quantises; None where nothing says.
    """
    products: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = layer.rt_info
        kind, name = str(info["layerType"].value), str(info["runtimePrecision"].value)
        counts = products if kind in _PRODUCTS else attention if kind in _ATTENTION else None
        if counts is not None:
            counts[_DTYPES.get(name, name)] += 1
    return Precision(dict(products), dict(attention), quantised)


# What OpenVINO puts before the sentence that says what is wrong
_SOURCE_LINES = re.compile(
    r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \S+:"
    r"|Model wasn't fully converted\.|Summary:"
)


def _reason(error: Exception) -> str:
    return one_line(_SOURCE_LINES.sub(" ", str(error)))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except MsnExportError:
        raise
    except Exception as error:
        raise DeviceError(f"OpenVINO failed on a batch: {_reason(error)}") from error


def _spec_of(port: Any) -> TensorSpec:
    name, kind = _name_of(port), port.element_type.get_type_name()
    shape = port.partial_shape
    sizes = () if shape.rank.is_dynamic else tuple(shape)
    return TensorSpec(
        name,
        _ONNX_NAMES.get(kind, kind),
        tuple(
            ("?" if axis else "batch") if size.is_dynamic else size.get_length()
            for axis, size in enumerate(sizes)
        ),
    )


def _name_of(port: Any) -> str:
    """Name an input or output as the graph does; it also has the names of what was fused into it.

    The node behind an output is called as the output, with its place behind.
    """
    name: str = port.node.get_friendly_name().partition("/sink_port")[0]
    return name if name in port.get_names() else str(port.any_name)


@dataclass(frozen=True, slots=True)
class OpenVinoOptions:
    """The way a model is compiled.

    ``precision`` is what fp32 graphs are computed in, ``hint`` the aim of its threads: one call at
    a time with all of them, or several calls with some each. ``threads`` None leaves their number
    to OpenVINO.
    """

    precision: Dtype = Dtype.FP32
    hint: Hint = "latency"
    threads: int | None = None

    @classmethod
    def of(cls, precision: str | None, hint: str | None, threads: int | None) -> OpenVinoOptions:
        """Read what a caller gives; None is the default."""
        found = next((one for one in PRECISIONS if one == (precision or Dtype.FP32)), None)
        if found is None:
            raise RunnerError(f"precision is {precision!r}; expected {' or '.join(PRECISIONS)}")
        aim = next((one for one in HINTS if one == (hint or "latency")), None)
        if aim is None:
            raise RunnerError(f"hint is {hint!r}; expected {' or '.join(HINTS)}")
        return cls(found, aim, threads)

    @property
    def config(self) -> dict[str, Any]:
        """OpenVINO's properties."""
        precision, mode = PRECISIONS[self.precision]
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "EXECUTION_MODE_HINT": mode,
            "PERFORMANCE_HINT": self.hint.upper(),
            "ENABLE_CPU_PINNING": False,
        }
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.threads
        return config


class OpenVinoRunner(Runner):
    """A compiled model over one image input, on the CPU.

    ``precision`` is read back from it. ``model_cache`` says what was loaded from the user's cache,
    or written there.
    """

    def __init__(
        self,
        model: Path,
        options: OpenVinoOptions | None = None,
        *,
        manifest: Manifest | None = None,
        metadata: GraphMetadata | None = None,
    ) -> None:
        options = options or OpenVinoOptions()
        stated = manifest or metadata
        row = stated.row if stated is not None else None
        if (reason := too_old(row, Client.OPENVINO, VERSION)) is not None:
            raise RunnerError(f"{model.name} {reason} (pip install -U openvino)")
        require_bounded_loops(model)
        core = openvino.Core()
        _require_precision(core, options.precision)
        cache = ModelCache(None, "weights may lie in files beside a graph without a manifest")
        if manifest is not None:
            cache = ModelCache(cache_path(model, sha256_of(model), _key(core, options)))
        self._compiled: Any = _compiled(core, model, options, cache)
        self.model_cache = cache.state
        quantised = manifest.quantization.products if manifest and manifest.quantization else None
        self.precision = read_precision(self._compiled, quantised)
        _require_executed(self.precision, options.precision, stated, model.name)
        inputs = tuple(_spec_of(port) for port in self._compiled.inputs)
        if len(inputs) != 1 or inputs[0].dtype not in OF_ONNX or not inputs[0].shape:
            raise GraphError(f"{model} takes {inputs}; expected one image input")
        self._type = getattr(openvino.Type, _TYPES[inputs[0].dtype])
        self._ahead = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) + 1
        named = "" if options.precision is Dtype.FP32 else f", {options.precision}"
        super().__init__(
            f"OpenVINO {VERSION}, CPU{named}",
            manifest,
            inputs,
            tuple(_spec_of(port) for port in self._compiled.outputs),
            profiles_of(inputs[0], manifest),
            metadata,
        )
        self.file = model
        if options.precision is not Dtype.FP32:
            self.rounds_as = options.precision

    def __call__(self, images: Any, *, stream: Any = None) -> Outputs:  # noqa: ARG002
        """Run any number of images of the host (see ``Runner``); ``stream`` does nothing.

        Each call has its own request, so threads may share the runner, and no later call writes
        the outputs.
        """
        self._require_open()
        images = self._pixels(images)
        if isinstance(images, np.ndarray):
            require_fit(images.shape, element_of(images), self.inputs[0])
            outputs = run_in_chunks(images, self.profiles, self._run)
            return self._named(outputs)
        borrowed = dlpack.borrow(images)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        if borrowed.device is not None:
            raise InputError(
                f"images lie on GPU {borrowed.device}; {self.name} takes them from the host"
            )
        back = take_back(images)
        named = zip(
            (spec.name for spec in self.outputs),
            run_in_chunks(borrowed.array(), self.profiles, self._run),
            strict=True,
        )
        return Outputs({name: back(self._for_dlpack(name, array)) for name, array in named})

    def map(self, batches: Iterable[NDArray[Any]]) -> Iterator[Outputs]:
        """Run batches in order (see ``Runner``), as many at a time as OpenVINO has streams.

        One more waits in OpenVINO's queue, so that no stream waits for the caller.
        """
        under_way: deque[tuple[Any, NDArray[Any]]] = deque()
        try:
            for images in batches:
                self._require_open()
                require_fit(images.shape, element_of(images), self.inputs[0])
                if not self.batch.min <= len(images) <= self.batch.max:
                    # to be split, or padded
                    yield from self._finished(under_way, 0)
                    yield self(images)
                    continue
                whole = np.ascontiguousarray(images)
                with _translated():
                    request = self._request(whole)
                    request.start_async()
                under_way.append((request, whole))
                yield from self._finished(under_way, self._ahead - 1)
            yield from self._finished(under_way, 0)
        finally:
            for request, _ in under_way:  # their memory is read until they end
                with suppress(Exception):
                    request.wait()

    def close(self) -> None:
        """Free the model once no call is under way."""
        self._is_open = False
        self._compiled = None

    def _finished(self, under_way: deque[tuple[Any, NDArray[Any]]], left: int) -> Iterator[Outputs]:
        while len(under_way) > left:
            request, _whole = under_way[0]
            with _translated():
                request.wait()
                outputs = _copied(request, len(self.outputs))
            under_way.popleft()
            yield self._named(outputs)

    def _named(self, outputs: list[NDArray[Any]]) -> Outputs:
        named = zip((spec.name for spec in self.outputs), outputs, strict=True)
        return Outputs({name: self._for_numpy(name, array) for name, array in named})

    def _run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        whole = np.ascontiguousarray(images)
        with _translated():
            request = self._request(whole)
            request.infer()
            return _copied(request, len(self.outputs))

    def _request(self, images: NDArray[Any]) -> Any:
        """Make a request that reads images where they are; that takes about 10 us."""
        compiled = self._compiled
        self._require_open()
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, images.shape, self._type))
        return request


def _copied(request: Any, outputs: int) -> list[NDArray[Any]]:
    """Copy outputs out of OpenVINO's memory; bfloat16 as its bytes."""
    found = []
    for index in range(outputs):
        tensor = request.get_output_tensor(index)
        array = np.array(tensor.data)
        is_bf16 = tensor.element_type == openvino.Type.bf16
        found.append(array.view(np.uint16) if is_bf16 else array)
    return found


def _key(core: Any, options: OpenVinoOptions) -> str:
    """Name all that a compiled model depends on beside its file."""
    instructions = " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    processor = core.get_property("CPU", "FULL_DEVICE_NAME")
    return f"{openvino.__version__} {processor} {instructions} {options}"


def _compiled(core: Any, model: Path, options: OpenVinoOptions, cache: ModelCache) -> Any:
    def compile_model(more: Mapping[str, Any]) -> Any:
        try:
            _require_onnx(model)
            return core.compile_model(str(model), "CPU", {**options.config, **more})
        except Exception as error:
            raise GraphError(
                f"OpenVINO {VERSION} refuses {model.name}: {_reason(error)}"
            ) from error

    return cache.compile(compile_model)


def _require_onnx(model: Path) -> None:
    """Raise where OpenVINO's reader of ONNX does not take a file, which others would then try."""
    reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    if not reader.supported(str(model)):
        reader.convert(reader.load(str(model)))


def _require_precision(core: Any, precision: Dtype) -> None:
    if precision is Dtype.BF16 and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise RunnerError(
            "this processor has no instructions for bf16 that OpenVINO uses (AVX512_BF16 or AMX); "
            "leave precision out"
        )


def _require_executed(
    found: Precision, asked: Dtype, stated: Manifest | GraphMetadata | None, file: str
) -> None:
    """Require that a model computes in the precision that was asked for."""
    if asked is Dtype.BF16 and not found.products.get("bf16") and not found.products.get("int8"):
        raise RunnerError(f"{file}: bf16 was asked for, and OpenVINO {VERSION} runs {found}")
    coarse = {"bf16", "fp16"} & {*found.products, *found.attention}
    if asked is Dtype.FP32 and coarse and stated is not None and stated.dtype is Dtype.FP32:
        raise RunnerError(f"{file} is an fp32 graph, and OpenVINO {VERSION} runs {found}")
