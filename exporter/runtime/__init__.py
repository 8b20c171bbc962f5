"""Run an artifact: ``open_runner`` gives what maps a batch of images to named outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from msn_export import manifest as manifests
from msn_export.errors import GraphError
from msn_export.spec import BatchRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from msn_export.manifest import Manifest
    from msn_export.runtime.ort import OrtRunner

_ONNX_NAMES = {"tensor(float)": "float", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class Runner(Protocol):
    """An artifact that is open and ready to run."""

    name: str
    manifest: Manifest | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchRange

    def __call__(self, images: Any, /) -> Mapping[str, Any]:
        """Run a batch in the artifact's own input type; outputs by name."""

    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self) -> Self:
        """Give itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""


def open_runner(
    path: Path | str,
    *,
    device: int | None = None,
    providers: Sequence[str] | None = None,
    trust: bool = False,
    threads: int | None = None,
) -> Runner:
    """Open an artifact after its manifest was checked.

    Raises:
        GraphError: there is no such file, or it cannot be run here.
        ManifestError: it is not the file its manifest describes.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist; give an .onnx or .engine file")
    manifest = manifests.read(path)
    if manifest is not None:
        manifests.require_match(path, manifest)
    if path.suffix != ".onnx":
        raise GraphError(f"{path} is no .onnx file; this version runs no engine yet")
    from msn_export.runtime.ort import OrtRunner

    del device, trust
    runner = OrtRunner(path, tuple(providers or ("CPUExecutionProvider",)), threads=threads)
    return _GraphRunner(runner, manifest)


class _GraphRunner:
    def __init__(self, runner: OrtRunner, manifest: Manifest | None) -> None:
        self._runner = runner
        self.name = runner.name
        self.manifest = manifest
        session = runner.session
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        size = self.inputs[0].shape[0]
        if isinstance(size, int):
            self.batch = BatchRange(size, size, size)
        else:
            self.batch = manifest.profiles[0] if manifest is not None else BatchRange()

    def __call__(self, images: NDArray[Any], /) -> Mapping[str, Any]:
        return self._runner(images)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spec(tensor: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    return TensorSpec(tensor.name, _ONNX_NAMES.get(tensor.type, tensor.type), shape)
