"""ONNX files in onnxruntime, and the execution providers that run them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from msn_export.errors import DeviceError, GraphError, InputError, MsnExportError, RunnerError
from msn_export.host import Driver, NoDriver, find_driver
from msn_export.manifest import Manifest
from msn_export.runtime import dlpack
from msn_export.runtime.dlpack import OF_ONNX, Borrowed, Tensor, finish, take_back
from msn_export.runtime.runner import (
    Chunk,
    Outputs,
    Runner,
    combine,
    element_of,
    pad,
    require_fit,
    split_batch,
)
from msn_export.spec import BatchRange, TensorSpec

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
        names = ", ".join(short.get(one, one) for one in available)
        hint = "; pip install onnxruntime-gpu instead of onnxruntime" if name == CUDA else ""
        raise RunnerError(f"this onnxruntime has no provider {name!r}; it has {names}{hint}")


def _require_device(name: str, device: int, driver: Driver | NoDriver) -> None:
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"{name} was asked for, and here: {driver.reason}; ask for providers=['cpu'], or run "
            "where an NVIDIA GPU is"
        )
    driver.require_index(device)


# What onnxruntime's errors on its own Q/DQ passes name
_QUANTISED = re.compile("float8|QLinear|QuantizeLinear|MatMulInteger")

# A graph with a dynamic batch takes any; one larger than this is no single batch of images.
_ANY = BatchRange(1, 8, 65536)


def open_session(
    model: Path, providers: list[tuple[str, dict[str, Any]]], threads: int | None
) -> Any:
    options = onnxruntime.SessionOptions()
    # Failures are raised too, and require_obtained names what cannot be loaded; the log would
    # print the names in a hostile file as they are, with the characters that a terminal obeys
    options.log_severity_level = 4
    if ON_GPU.intersection(name for name, _ in providers):
        _preload()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return _open(model, options, providers)
    except Exception as error:
        raise GraphError(f"onnxruntime refuses {model.name}: {_one_line(error)}") from error


def _open(
    model: Path, options: onnxruntime.SessionOptions, providers: list[tuple[str, dict[str, Any]]]
) -> Any:
    """Open a session; where onnxruntime 1.31 refuses what its own optimiser made, without it.

    Where the batch is fixed, MatMulAddFusion makes Gemm of MatMul and Add and then changes a zero
    point's type. Its Q/DQ passes make integer operators of products in fp8, and of others with
    fp16 scales, which have no kernel for either.
    """
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=providers)
    except Exception as error:
        without = ["MatMulAddFusion"] if "gemm_input_reshape" in str(error) else []
        if not without and not _QUANTISED.search(str(error)):
            raise
        if not without:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(
            str(model), options, providers=providers, disabled_optimizers=without
        )


def _preload() -> None:
    """Load the CUDA libraries of the ``nvidia-*`` packages, which no loader path names.

    onnxruntime finds them by itself only where torch has loaded them. It prints what it misses,
    and stdout is for results; require_obtained names what then cannot be opened.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with redirect_stdout(StringIO()):
            preload()


def spec_of(node: Any) -> TensorSpec:
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(
        node.name, dtype, tuple(size if size is not None else "?" for size in node.shape)
    )


def profiles_of(spec: TensorSpec, manifest: Manifest | None) -> tuple[BatchRange, ...]:
    """Batches a graph accepts: its own where fixed, else any up to the manifest's."""
    size = spec.shape[0]
    if isinstance(size, int):
        return (BatchRange(size, size, size),)
    if manifest is None or not manifest.profiles:
        return (_ANY,)
    batch = combine(manifest.profiles)
    return (BatchRange(1, batch.opt, batch.max),)


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except MsnExportError:
        raise
    except Exception as error:
        raise DeviceError(f"onnxruntime failed on a batch: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class OrtRunner(Runner):
    """An onnxruntime session over one image input.

    ``providers`` are execution providers in order of preference, ``cpu``, ``cuda``, ``tensorrt`` or
    in full; None is ``choose``'s default. ``threads`` compute one call on the CPU; None leaves it
    to onnxruntime. The manifest's profiles bound the batch.
    """

    def __init__(
        self,
        model: Path,
        providers: Sequence[str] | None = (CPU,),
        *,
        device: int | None = None,
        threads: int | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        available = onnxruntime.get_available_providers()
        chosen = choose(providers, device, available, find_driver())
        self._session: Any = open_session(model, chosen, threads)
        obtained = self._session.get_providers()
        require_obtained([name for name, _ in chosen], obtained, model.name)
        inputs = tuple(spec_of(node) for node in self._session.get_inputs())
        if len(inputs) != 1 or inputs[0].dtype not in OF_ONNX or not inputs[0].shape:
            raise GraphError(f"{model} takes {inputs}; expected one image input")
        first = chosen[0][0]
        self._device = (device or 0) if first in ON_GPU else None
        super().__init__(
            f"onnxruntime {onnxruntime.__version__}, {first}",
            manifest,
            inputs,
            tuple(spec_of(node) for node in self._session.get_outputs()),
            profiles_of(inputs[0], manifest),
        )
        self._names = [spec.name for spec in self.outputs]
        self._through_numpy = all(
            OF_ONNX[spec.dtype].numpy for spec in (*inputs, *self.outputs) if spec.dtype in OF_ONNX
        )

    def __call__(self, images: Any, *, stream: Any = None) -> Outputs:
        """Run any number of images (see ``Runner``); returns when the outputs are there.

        Tensors on the GPU go in and come out by their address. onnxruntime runs in a stream of its
        own, so what torch, cupy or jax still compute in theirs, and ``stream`` as an object of
        theirs, is waited for first.
        """
        self._require_open()
        images = self._pixels(images)
        if isinstance(images, np.ndarray):
            require_fit(images.shape, element_of(images), self.inputs[0])
            if self._through_numpy:
                return Outputs(self._run_arrays(images))
            bound = self._run_bound(dlpack.borrow(np.ascontiguousarray(images)))
            return Outputs({name: tensor.array() for name, tensor in bound.items()})
        borrowed = dlpack.borrow(images)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        if borrowed.device is not None:  # the TensorRT provider waits for nothing by itself
            finish(images, borrowed.device, stream)
        back = take_back(images)
        if borrowed.device is None and self._through_numpy:
            outputs: dict[str, Any] = self._run_arrays(borrowed.array())
        else:
            outputs = self._run_bound(borrowed)
        use_on = None if borrowed.device is None else _refuse_stream
        return Outputs({name: back(array) for name, array in outputs.items()}, use_on)

    def close(self) -> None:
        """Free the session once no call is under way."""
        self._is_open = False
        self._session = None

    def _run_arrays(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        chunks = split_batch(len(images), self.profiles)
        if len(chunks) == 1 and chunks[0].size == len(images):
            return dict(zip(self._names, self._run(images), strict=True))
        runs = [self._run(pad(images[p.start : p.start + p.count], p.size)) for p in chunks]
        whole = {}
        for index, name in enumerate(self._names):
            parts = [run[index][: chunk.count] for run, chunk in zip(runs, chunks, strict=True)]
            whole[name] = np.concatenate(parts)
        return whole

    def _run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        session = self._open()
        with translated():
            outputs: list[NDArray[Any]] = session.run(self._names, {self.inputs[0].name: images})
        return outputs

    def _run_bound(self, images: Borrowed) -> dict[str, Tensor]:
        """Run on addresses: tensors on the GPU, and dtypes that NumPy does not have."""
        self._require_here(images)
        session, source = self._open(), images.element
        chunks = split_batch(images.shape[0], self.profiles)
        if any(chunk.size != chunk.count for chunk in chunks):
            raise InputError(
                f"the graph takes batches of {self.batch.min} and these {images.shape[0]} images "
                "would have to be padded, which is done for NumPy arrays only; pad them"
            )
        location = ("cpu", 0) if images.device is None else ("cuda", images.device)
        row = source.bytes * math.prod(images.shape[1:])
        with translated():
            whole = {
                spec.name: (spec, onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    [images.shape[0], *_fixed(spec)], OF_ONNX[spec.dtype].number, *location))
                for spec in self.outputs
            }  # fmt: skip
            for chunk in chunks:
                binding = session.io_binding()
                binding.bind_input(
                    self.inputs[0].name, *location, source.number,
                    [chunk.size, *images.shape[1:]], images.pointer + chunk.start * row,
                )  # fmt: skip
                for spec, value in whole.values():
                    _bind_rows(binding, spec, value, chunk, location)
                binding.synchronize_inputs()  # the CUDA provider waits for the whole device
                session.run_with_iobinding(binding)
        return {
            name: Tensor(
                value.data_ptr(), tuple(value.shape()), OF_ONNX[spec.dtype], images.device, value
            )
            for name, (spec, value) in whole.items()
        }

    def _require_here(self, images: Borrowed) -> None:
        if images.device not in {None, self._device}:
            here = "the host" if self._device is None else f"the host or GPU {self._device}"
            raise InputError(
                f"images lie on GPU {images.device}; {self.name} takes them from {here}"
            )
        if not images.is_contiguous:
            raise InputError("images are not contiguous; make them so (torch: .contiguous())")

    def _open(self) -> Any:
        session = self._session
        self._require_open()
        return session


def _refuse_stream(_stream: Any) -> None:
    raise RunnerError(
        "onnxruntime frees an output when it is dropped, whatever streams still use it; wait for "
        "the stream (torch: stream.synchronize()) before you drop the output"
    )


def _fixed(spec: TensorSpec) -> list[int]:
    sizes = [size for size in spec.shape[1:] if isinstance(size, int)]
    if len(sizes) != len(spec.shape) - 1 or spec.dtype not in OF_ONNX:
        raise InputError(
            f"output {spec.name!r} is {spec.dtype} {list(spec.shape)}, which has no place before "
            "it is computed; give NumPy arrays"
        )
    return sizes


def _bind_rows(
    binding: Any, spec: TensorSpec, value: Any, chunk: Chunk, location: tuple[str, int]
) -> None:
    element, sizes = OF_ONNX[spec.dtype], _fixed(spec)
    start = value.data_ptr() + chunk.start * element.bytes * math.prod(sizes)
    binding.bind_output(spec.name, *location, element.number, [chunk.size, *sizes], start)
