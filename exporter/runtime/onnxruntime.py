"""ONNX files in onnxruntime."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from msn_export.errors import (
    DeviceError,
    GraphError,
    InputError,
    MsnExportError,
    RunnerError,
    one_line,
)
from msn_export.host import find_driver, require_memory
from msn_export.manifest import Manifest, read_stated, require_input
from msn_export.onnx_header import GraphMetadata, read_onnx_header
from msn_export.onnx_loops import require_bounded_loops
from msn_export.runtime import dlpack
from msn_export.runtime.batches import Chunk, profiles_of, run_in_chunks, split_batch
from msn_export.runtime.dlpack import OF_ONNX, Borrowed, Tensor, finish, take_back
from msn_export.runtime.providers import (
    CPU,
    ON_GPU,
    available_providers,
    choose,
    load_gpu,
    nodes_on_cpu,
    require_obtained,
    require_on_gpu,
)
from msn_export.runtime.runner import Outputs, Runner, element_of, require_fit
from msn_export.spec import TensorSpec
from msn_export.version_table import Client, too_old

# What onnxruntime's errors on its own Q/DQ passes name
_QUANTISED = re.compile("float8|QLinear|QuantizeLinear|MatMulInteger")


def open_session(
    model: Path, providers: list[tuple[str, dict[str, Any]]], threads: int | None
) -> Any:
    """Open a session on these providers and no others; ``require_on_gpu`` judges where it runs."""
    options = onnxruntime.SessionOptions()
    # Failures are raised too, and require_obtained names what cannot be loaded; the log would
    # print the names in a hostile file as they are, with the characters that a terminal obeys
    options.log_severity_level = 4
    names = [name for name, _ in providers]
    load_gpu(names)
    if ON_GPU.intersection(names):
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.add_session_config_entry(_STRICT, "0" if CPU in names else "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return _open(model, options, providers)
    except Exception as error:
        too_old = _too_old(model, str(error))
        refusal = f"onnxruntime refuses {model.name}: {one_line(error)}"
        raise GraphError(too_old or refusal) from error


# onnxruntime core/graph/model.cc, where it does not know a graph's opset
_NEWEST = re.compile(r"Current official support for domain ai\.onnx is till opset (\d+)")


def _too_old(model: Path, refusal: str) -> str | None:
    """Name the onnxruntime that takes a graph this one is too old for; None where it is not."""
    here = onnxruntime.__version__
    stated = read_stated(model)
    if (reason := too_old(stated.row if stated else None, Client.ONNXRUNTIME, here)) is not None:
        return f"{model.name} {reason}"
    newest, opset = _NEWEST.search(refusal), read_onnx_header(model).opset
    if newest is None or opset is None or opset <= int(newest[1]):
        return None
    return (
        f"{model.name} is of opset {opset}, and onnxruntime {here} knows those to {newest[1]}; "
        "install a later onnxruntime, or export it for an earlier opset"
    )


# With it no session is made that would run a node on the CPU, which onnxruntime else does silently
_STRICT = "session.disable_cpu_ep_fallback"
_ASSIGNED = "assigned to the default CPU EP"  # what it then raises


def _open(
    model: Path, options: onnxruntime.SessionOptions, providers: list[tuple[str, dict[str, Any]]]
) -> Any:
    """Open a session; where onnxruntime 1.31 refuses what its own optimiser made, without it.

    Where the batch is fixed, MatMulAddFusion makes Gemm of MatMul and Add and then changes a zero
    point's type. Its Q/DQ passes make integer operators of products in fp8, and of others with
    fp16 scales, which have no kernel for either. Where nodes would run on the CPU, it is opened all
    the same: only then can they be listed.
    """
    without: list[str] = []
    for _ in range(3):  # each of the three reasons once
        try:
            return _session(model, options, providers, without)
        except Exception as error:
            if _ASSIGNED in str(error):
                options.add_session_config_entry(_STRICT, "0")
            elif "gemm_input_reshape" in str(error):
                without = ["MatMulAddFusion"]
            elif _QUANTISED.search(str(error)):
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            else:
                raise
    return _session(model, options, providers, without)


def _session(
    model: Path,
    options: onnxruntime.SessionOptions,
    providers: list[tuple[str, dict[str, Any]]],
    without: list[str],
) -> Any:
    with warnings.catch_warnings():
        # that a provider is none of the built-in ones: so it is where it comes as a plugin
        warnings.filterwarnings("ignore", message="Specified provider")
        return onnxruntime.InferenceSession(
            str(model),
            options,
            providers=providers,
            disabled_optimizers=without,
            enable_fallback=0,  # else it prints a failure on stdout, and runs on the CPU
        )


def spec_of(node: Any) -> TensorSpec:
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(
        node.name, dtype, tuple(size if size is not None else "?" for size in node.shape)
    )


@contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except MsnExportError:
        raise
    except Exception as error:
        raise DeviceError(f"onnxruntime failed on a batch: {one_line(error)}") from error


class OrtRunner(Runner):
    """An onnxruntime session over one image input.

    ``providers`` are execution providers in order of preference, ``cpu``, ``cuda``, ``tensorrt`` or
    in full; None is ``choose``'s default. ``threads`` compute one call on the CPU; None leaves it
    to onnxruntime. The manifest's profiles bound the batch. ``on_cpu`` counts the operators that
    run on the CPU although a GPU's provider was asked for: of shapes, and where ``cpu`` is asked
    for too, those without a kernel.
    """

    def __init__(
        self,
        model: Path,
        providers: Sequence[str] | None = (CPU,),
        *,
        device: int | None = None,
        threads: int | None = None,
        manifest: Manifest | None = None,
        metadata: GraphMetadata | None = None,
    ) -> None:
        chosen = choose(providers, device, available_providers(), find_driver())
        names = [name for name, _ in chosen]
        require_bounded_loops(model)
        self._session: Any = open_session(model, chosen, threads)
        require_obtained(names, self._session.get_providers(), model.name)
        self.on_cpu = nodes_on_cpu(self._session) if ON_GPU.intersection(names) else {}
        require_on_gpu(self.on_cpu, names, model.name)
        inputs = tuple(spec_of(node) for node in self._session.get_inputs())
        if len(inputs) != 1 or inputs[0].dtype not in OF_ONNX or not inputs[0].shape:
            raise GraphError(f"{model} takes {inputs}; expected one image input")
        require_input(manifest, inputs, str(model))
        profiles = profiles_of(inputs[0], manifest)
        item = OF_ONNX[inputs[0].dtype].bytes
        require_memory(str(model), profiles[0].min, inputs[0].shape[1:], item)
        first = chosen[0][0]
        self._device = (device or 0) if first in ON_GPU else None
        super().__init__(
            f"onnxruntime {onnxruntime.__version__}, {first}",
            manifest,
            inputs,
            tuple(spec_of(node) for node in self._session.get_outputs()),
            profiles,
            metadata,
        )
        self.file = model
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
        outputs = run_in_chunks(images, self.profiles, self._run)
        return dict(zip(self._names, outputs, strict=True))

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
