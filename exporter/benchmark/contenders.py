"""Who takes part in a benchmark, and how each is opened in its own process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msn_export import manifest as manifests
from msn_export.errors import BenchError, GraphError
from msn_export.manifest import sha256_of
from msn_export.models.named import AS_IT_SAYS, Choices
from msn_export.schema import from_plain, to_plain
from msn_export.spec import Dtype, ImageSize, InputFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from msn_export.manifest import Manifest
    from msn_export.preprocessing import Preprocessing
    from msn_export.spec import ImageSize


# PyTorch contenders: the form of attention, and whether torch.compile gets the model
TORCH = {"eager": ("eager", False), "sdpa": ("sdpa", False), "compile": ("sdpa", True)}


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """One that is to be timed: ``opening`` is what its process is asked to open."""

    name: str
    kind: str
    opening: dict[str, Any]
    file: Path | None = None
    manifest: Manifest | None = None
    sha256: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how contenders run; ``device`` None is the CPU, ``resident`` leaves out copies."""

    threads: int
    device: int | None = None
    providers: tuple[str, ...] = ()
    trust: bool = False
    resident: bool = False
    cuda_graphs: bool = True

    @property
    def torch_device(self) -> str:
        """The device as torch calls it."""
        return "cpu" if self.device is None else f"cuda:{self.device}"


def artifacts(paths: Sequence[Path], where: Placement) -> list[ContenderSpec]:
    """Enter files under their names, or their paths where names are alike."""
    names = Counter(path.name for path in paths)
    found = [
        artifact(path, where, path.name if names[path.name] == 1 else str(path)) for path in paths
    ]
    twice = [name for name, count in Counter(entry.name for entry in found).items() if count > 1]
    if twice:
        raise GraphError(f"{twice[0]} is given twice; name each artifact once")
    return found


def artifact(path: Path, where: Placement, name: str) -> ContenderSpec:
    """Enter one .onnx or .engine file."""
    if not path.is_file():
        raise GraphError(f"{path} does not exist; give an .onnx or .engine file")
    manifest = manifests.read(path)
    opening = {
        "kind": "artifact",
        "path": str(path),
        "device": where.device,
        "providers": list(where.providers) if path.suffix == ".onnx" else [],
        "trust": where.trust,
        "threads": where.threads,
        "resident": where.resident,
        "cuda_graphs": where.cuda_graphs,
    }
    return ContenderSpec(
        name,
        "onnx" if path.suffix == ".onnx" else "engine",
        opening,
        file=path,
        manifest=manifest,
        sha256=manifest.sha256 if manifest is not None else sha256_of(path),
        dtype=str(manifest.dtype) if manifest is not None else None,
    )


def source_graphs(entries: Sequence[ContenderSpec], where: Placement) -> Iterator[ContenderSpec]:
    """Enter the graphs that engines were compiled from: ``--against onnxruntime``."""
    engines = [entry for entry in entries if entry.kind == "engine"]
    if not engines:
        raise BenchError("onnxruntime: every artifact here is an .onnx file and runs in it already")
    for entry in engines:
        source = entry.manifest.source if entry.manifest is not None else None
        if entry.file is None or source is None:
            raise BenchError(
                f"onnxruntime: {entry.name} has no manifest that names its graph; give the .onnx "
                "file as one more artifact"
            )
        path = entry.file.parent / Path(source.file).name
        if not path.is_file() or sha256_of(path) != source.sha256:
            raise BenchError(
                f"onnxruntime: the graph of {entry.name}, {source.file}, is not beside it; give "
                "the .onnx file as one more artifact"
            )
        if path.name not in {other.name for other in entries}:
            yield artifact(path, where, path.name)


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that PyTorch contenders load, and what of it the artifacts put out."""

    checkpoint: str
    sha256: str | None
    outputs: tuple[str, ...]
    size: ImageSize
    choices: Choices = AS_IT_SAYS


def origin_of(
    entries: Sequence[ContenderSpec],
    checkpoint: str | None,
    outputs: tuple[str, ...],
    size: ImageSize,
    choices: Choices = AS_IT_SAYS,
) -> Origin:
    """Find the checkpoint: the one that was named, or the first artifact's own.

    It is read as the manifest says it was, unless ``choices`` say otherwise.
    """
    known = [entry.manifest.checkpoint for entry in entries if entry.manifest is not None]
    record = next((one for one in known if one is not None), None)
    if record is None and checkpoint is None:
        raise BenchError("no manifest names a checkpoint; name it with --checkpoint")
    sha256 = record.sha256 if record else None
    if record is not None and not choices:
        choices = Choices(record.variant, record.weights)
    if checkpoint is not None:
        return Origin(checkpoint, sha256, outputs, size, choices)
    assert record is not None
    return Origin(record.source, sha256, outputs, size, choices)


def torch_dtype(entry: ContenderSpec, where: Placement) -> Dtype:
    """Choose what PyTorch computes in beside an artifact: fp32 on the CPU, on a GPU its dtype.

    Half precision beside 8 bits: the PyTorch reference has no quantised form.
    """
    if where.device is None or entry.dtype is None:
        return Dtype.FP32
    dtype = Dtype(entry.dtype)
    return Dtype.FP16 if dtype.is_quantised else dtype


def torch_entry(kind: str, origin: Origin, where: Placement, dtype: Dtype) -> ContenderSpec:
    """Enter the PyTorch reference in one of its forms."""
    attention, compiled = TORCH[kind]
    opening = {
        "kind": "torch",
        "attention": attention,
        "compile": compiled,
        "checkpoint": origin.checkpoint,
        "sha256": origin.sha256,
        "variant": origin.choices.variant,
        "weights": origin.choices.weights,
        "outputs": list(origin.outputs),
        "size": {"height": origin.size.height, "width": origin.size.width},
        "dtype": str(dtype),
        "device": where.torch_device,
        "threads": where.threads,
        "resident": where.resident,
    }
    return ContenderSpec(kind, kind, opening, sha256=origin.sha256, dtype=str(dtype))


class Timed(Protocol):
    """What is timed: ``prepare`` puts a batch where a call takes it from, uncounted."""

    def described(self) -> dict[str, Any]:
        """Say what was opened."""

    @property
    def cuda_graphs(self) -> str | None:
        """How CUDA graphs were used so far."""

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make the input of a call from decoded pictures [b, h, w, c]."""

    def call(self, feed: Any) -> Mapping[str, Any]:
        """Run it to its end; outputs by name."""


class ArtifactContender:
    """An .onnx or .engine file, through the runtime."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        from msn_export.runtime import open_runner

        self._runner = open_runner(
            told["path"],
            device=told["device"],
            providers=told["providers"] or None,
            trust=told["trust"],
            threads=told["threads"],
            cuda_graphs=told["cuda_graphs"],
            eager_kernels=True,  # no kernel changes while it is timed
        )
        self._resident = told["resident"]
        self._device = told["device"] or 0

    def described(self) -> dict[str, Any]:
        """Say what was opened."""
        runner = self._runner
        return {
            "runs": runner.name,
            "inputs": to_plain(runner.inputs),
            "outputs": to_plain(runner.outputs),
            "batch": str(runner.batch),
        }

    @property
    def cuda_graphs(self) -> str | None:
        """How an engine's kernels are replayed; a graph's runner replays none."""
        return getattr(self._runner, "cuda_graphs", None)

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make the artifact's own input."""
        from msn_export.artifact import Feed

        spec = self._runner.inputs[0]
        feed = Feed(InputFormat.of(spec.dtype), spec.dtype, preprocessing)(pixels)
        if not self._resident:
            return feed
        import torch

        return torch.from_numpy(feed).to(f"cuda:{self._device}")

    def call(self, feed: Any) -> Mapping[str, Any]:
        """Run it; outputs that stay on the GPU are waited for."""
        outputs = self._runner(feed)
        if self._resident:
            import torch

            torch.cuda.synchronize(self._device)
        return outputs


class Torch:
    """The PyTorch reference, its attention written out (eager) or fused (sdpa), or compiled."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        import torch

        from msn_export.benchmark.torch_reference import open_reference

        torch.set_num_threads(told["threads"])
        self._torch = torch
        self._device, self._resident = told["device"], told["resident"]
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            told["dtype"]
        ]
        reference = open_reference(
            told["checkpoint"],
            attention=told["attention"],
            outputs=told["outputs"],
            size=from_plain(ImageSize, told["size"], "size"),
            sha256=told["sha256"],
            choices=Choices(told["variant"], told["weights"]),
        )
        self._names = [head.output for head in reference.heads]
        model = reference.to(self._device, self._dtype)
        self._model = torch.compile(model, dynamic=False) if told["compile"] else model

    def described(self) -> dict[str, Any]:
        """Say what was opened."""
        where = self._device if self._device != "cpu" else "cpu"
        return {"runs": f"torch {self._torch.__version__}, {where}", "outputs": self._names}

    @property
    def cuda_graphs(self) -> str | None:
        """PyTorch launches kernel by kernel here, compiled or not."""
        return None

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make normalised planes."""
        from msn_export import images

        planes = self._torch.from_numpy(images.normalize(pixels, preprocessing))
        return planes.to(self._device, self._dtype) if self._resident else planes.to(self._dtype)

    def call(self, feed: Any) -> Mapping[str, Any]:
        """Run it; what runs on the GPU is waited for."""
        with self._torch.inference_mode():
            found = self._model(feed.to(self._device))
            if self._resident:
                self._torch.cuda.synchronize(self._device)
                return dict(zip(self._names, found, strict=True))
            return {
                name: value.float().cpu().numpy()
                for name, value in zip(self._names, found, strict=True)
            }


def open_timed(told: Mapping[str, Any]) -> Timed:
    """Open what a request describes."""
    return Torch(told) if told["kind"] == "torch" else ArtifactContender(told)
