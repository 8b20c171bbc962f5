"""From a path to a runner: which one. What a graph or an engine needs is imported for it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msn_export.errors import ManifestError, MissingPackageError, RunnerError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from msn_export.runtime.runner import Runner


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
    from msn_export.runtime.engine_opening import open_engine, verify_engine_file

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
