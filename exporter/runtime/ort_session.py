"""Open an onnxruntime session and read what it takes and gives."""

from __future__ import annotations

import re
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import onnxruntime

from msn_export.errors import DeviceError, GraphError, MsnExportError
from msn_export.runtime.batching import together
from msn_export.runtime.providers import ON_GPU
from msn_export.spec import BatchRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from msn_export.manifest import Manifest

# What onnxruntime's errors on its own Q/DQ passes name
_QUANTISED = re.compile("float8|QLinear|QuantizeLinear|MatMulInteger")

# A graph with a dynamic batch takes any; one larger than this is no single batch of images.
_ANY = BatchRange(1, 8, 65536)


def open_session(
    model: Path, providers: list[tuple[str, dict[str, Any]]], threads: int | None
) -> Any:
    """Open a session; what a provider needs and cannot load is left out, and told elsewhere.

    Raises:
        GraphError: onnxruntime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    # What fails is raised too, and what cannot be loaded is told by require_obtained; the log would
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
    and stdout is for results; what then cannot be opened is told by require_obtained.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with redirect_stdout(StringIO()):
            preload()


def spec_of(node: Any) -> TensorSpec:
    """Describe an input or output as manifests do: ``tensor(float)`` is ``float``."""
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(
        node.name, dtype, tuple(size if size is not None else "?" for size in node.shape)
    )


def profiles_of(spec: TensorSpec, manifest: Manifest | None) -> tuple[BatchRange, ...]:
    """Give the batches a graph accepts: its own where fixed, else any up to the manifest's."""
    size = spec.shape[0]
    if isinstance(size, int):
        return (BatchRange(size, size, size),)
    if manifest is None or not manifest.profiles:
        return (_ANY,)
    known = together(manifest.profiles)
    return (BatchRange(1, known.opt, known.max),)


@contextmanager
def translated() -> Iterator[None]:
    """Turn what onnxruntime raises into a DeviceError."""
    try:
        yield
    except MsnExportError:
        raise
    except Exception as error:
        raise DeviceError(f"onnxruntime failed on a batch: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
