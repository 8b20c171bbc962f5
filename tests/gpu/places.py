"""Where the GPU suite runs: on an NVIDIA card, or as a rehearsal on the CPU.

A rehearsal runs the suite's own code over a tiny model: torch on the CPU, and onnxruntime with the
typed graph in place of the engine. It shows that the suite works, and says nothing of any GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from msn_export import manifest as manifests
from msn_export.cli import main
from msn_export.engine.options import Backend, find_backend
from msn_export.engine_header import ANY_GPU, may_target, tries_any_gpu
from msn_export.errors import MissingPackageError
from msn_export.host import Device, NoDriver, find_driver
from msn_export.manifest import Manifest
from msn_export.models.checkpoint import Checkpoint, load_checkpoint
from msn_export.models.config import VARIANTS
from msn_export.runtime import Runner, open_runner
from msn_export.spec import ComputeCapability, Dtype
from tests.builders.checkpoints import hugging_face, processor

TINY = "tiny"
HEADS = ("--head", "cls", "--head", "mean")
# what a card computes in: NVIDIA's table of hardware and precision in TensorRT's support matrix
FIRST = {Dtype.BF16: ComputeCapability(8, 0), Dtype.FP8: ComputeCapability(8, 9)}
BATCHES = {"vit-msn-base-4": "1:2:4", "vit-msn-large-7": "1:4:8"}  # 3137 and 1025 tokens
CARD = pytest.param("card", marks=pytest.mark.gpu)
BARE = pytest.param("card without TensorRT", marks=pytest.mark.gpu)
SHAPES = [("rehearsal", TINY), *(pytest.param("card", v, marks=pytest.mark.gpu) for v in VARIANTS)]


@dataclass(frozen=True)
class Built:
    """What a place made of one shape in one dtype; ``artifact`` is what it runs."""

    checkpoint: Checkpoint
    master: Path
    artifact: Path
    manifest: Manifest


class Once:
    """What a function makes, made once: a failure is kept too, and so is the end of a process.

    A build that fails takes as long as one that does not; where it ended its process, the next
    process would end as well.
    """

    def __init__(self, make: Callable[..., Built], folder: Path) -> None:
        self._make, self._folder = make, folder
        self._kept: dict[tuple[Any, ...], Built] = {}

    def __call__(self, *key: Any) -> Built:
        if key in self._kept:
            return self._kept[key]
        name = ".".join(map(str, key))
        failure, begun = self._folder / f"{name}.failure", self._folder / f"{name}.begun"
        if begun.exists():
            failure.write_text("it ended the process that built it")
            begun.unlink()
        if failure.exists():
            pytest.fail(f"{name} was not built: {failure.read_text()}")
        begun.touch()
        try:
            self._kept[key] = self._make(*key)
        except (Exception, pytest.fail.Exception) as error:
            failure.write_text(f"{type(error).__name__}: {error}"[-4000:])
            raise
        finally:
            begun.unlink()
        return self._kept[key]


class Place(ABC):
    """Builds and runs artifacts; what was built once is kept."""

    torch_device: str

    def __init__(self, folder: Path, photographs: Path) -> None:
        self.folder = folder
        self.photographs = photographs
        self.build = Once(self._build, folder)
        self.checkpoint = cache(self._checkpoint)
        self.master = cache(self._master)

    def open(self, built: Built, **options: Any) -> Runner:
        """Open as a service does."""
        return open_runner(built.artifact, **options)

    @abstractmethod
    def obstacle(self, dtype: Dtype) -> str:
        """Say why nothing in a dtype can be built here; empty where it must."""

    @abstractmethod
    def source(self, shape: str) -> str:
        """Name the checkpoint."""

    @abstractmethod
    def _finished(self, graph: Path, dtype: Dtype) -> Path:
        """Make what runs of the fp32 graph, or of the quantised one."""

    def _checkpoint(self, shape: str) -> Checkpoint:
        return load_checkpoint(self.source(shape))

    def _master(self, shape: str) -> Path:
        """Export the fp32 graph, without a check: the artifact has its own on the card."""
        batch = ("--batch", BATCHES.get(shape, "1:8:16"))
        return self.run(
            self.folder / f"{shape}.onnx", "onnx", self.source(shape),
            *HEADS, *batch, "--no-check",
        )  # fmt: skip

    def _build(self, shape: str, dtype: Dtype) -> Built:
        graph = self.master(shape)
        if dtype.is_quantised:
            # the max observer and no search: what the card computes is asked, not what is best
            graph = self.run(
                self.folder / f"{shape}.{dtype}.onnx", "calibrate", str(graph), f"--{dtype}",
                "--observer", "max", "--smooth", "off", "--no-compile", *self.images(),
            )  # fmt: skip
        artifact = self._finished(graph, dtype)
        manifest = manifests.read(artifact)
        assert manifest is not None
        return Built(self.checkpoint(shape), self.master(shape), artifact, manifest)

    def images(self) -> tuple[str, str]:
        """Give the option that names the photographs."""
        return "--images", str(self.photographs)

    def canary(self, shape: str) -> Path:
        """Make an artifact in fp16 that has golden values, as a user does."""
        graph = self.folder / f"{shape}.canary.onnx"
        return self.run(
            graph, "onnx", self.source(shape), "--head", "cls", "--batch", "1:4:8", *self.images()
        )

    def run(self, output: Path, *arguments: str) -> Path:
        """Run a command that writes a file; what an earlier process wrote is kept."""
        if output.exists() and manifests.manifest_path(output).exists():
            return output
        done = self.command(*arguments, "-o", str(output))
        assert done.exit_code == 0, done.output
        return output

    def command(self, *arguments: str) -> Any:
        """Run a command as its user does."""
        return CliRunner().invoke(main, list(arguments))


class Rehearsal(Place):
    """The CPU, in place of a card."""

    torch_device = "cpu"

    def obstacle(self, dtype: Dtype) -> str:
        return "onnxruntime has no bf16 kernels on the CPU" if dtype is Dtype.BF16 else ""

    def source(self, shape: str) -> str:
        folder = self.folder / shape
        if not folder.exists():
            hugging_face(folder)
            size = {"height": 32, "width": 32}
            processor(folder, size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.2] * 3)
        return str(folder)

    def _finished(self, graph: Path, dtype: Dtype) -> Path:
        if dtype is Dtype.FP32 or dtype.is_quantised:
            return graph
        return self.run(
            graph.with_name(f"{graph.stem}.{dtype}.onnx"), "onnx", self.source(graph.stem),
            *HEADS, "--dtype", str(dtype), "--batch", "1:8:16", *self.images(),
        )  # fmt: skip


class Bare(Place):
    """The first GPU, for what runs there without TensorRT."""

    torch_device = "cuda"

    def __init__(self, folder: Path, photographs: Path, device: Device) -> None:
        super().__init__(folder, photographs)
        self.device = device

    def obstacle(self, dtype: Dtype) -> str:
        return f"no TensorRT is here to build {dtype} with"

    def source(self, shape: str) -> str:
        return f"random:{shape}:0"

    def _finished(self, graph: Path, dtype: Dtype) -> Path:
        raise NotImplementedError


class Card(Bare):
    """The first GPU, and the TensorRT that is installed."""

    def __init__(self, folder: Path, photographs: Path, device: Device, backend: Backend) -> None:
        super().__init__(folder, photographs, device)
        self.backend = backend

    def open(self, built: Built, **options: Any) -> Runner:
        """Open as a service does that wants the same bytes each time."""
        return super().open(built, **{"eager_kernels": True, **options})

    def obstacle(self, dtype: Dtype) -> str:
        first = FIRST.get(dtype)
        if first is not None and self.device.capability < first:
            return f"SM {self.device.capability} has no {dtype}: that begins with {first}"
        turing = self.device.capability < FIRST[Dtype.BF16]
        if self.backend.row.targets_capabilities and turing and dtype is Dtype.FP32:
            return f"{self.backend} has no fp32 products on SM {self.device.capability}"
        if self.backend.row.targets_capabilities and dtype is Dtype.FP8 and not self.target():
            return f"{self.backend} compiles fp8 for a named target, of which this GPU is none"
        if not self.backend.row.strongly_typed and (dtype.is_quantised or dtype is Dtype.BF16):
            return f"{self.backend} builds nothing in {dtype}"
        return ""

    def _finished(self, graph: Path, dtype: Dtype) -> Path:
        precision = () if dtype.is_quantised else (f"--{dtype}",)
        engine = self.folder / f"{graph.stem.split('.')[0]}.{dtype}.engine"
        return self.run(
            engine, "trt", str(graph), *precision, "--backend", self.backend.name, *self.target(),
            *self.images(),
        )  # fmt: skip

    def canary(self, shape: str) -> Path:
        graph = super().canary(shape)
        return self.run(
            graph.with_suffix(".engine"), "trt", str(graph), "--fp16", "--backend",
            self.backend.name, *self.target(), *self.images(),
        )  # fmt: skip

    def target(self) -> tuple[str, ...]:
        """Name this card to a compiler that would else write for any, where it knows the card."""
        known = may_target(self.device.capability)
        if not self.backend.row.targets_capabilities or not known:
            return ()
        return "--compute-capability", str(self.device.capability)


def find_bare(folder: Path, photographs: Path) -> Bare:
    """Find a card that torch can use, or skip with what is missing."""
    driver = find_driver()
    if isinstance(driver, NoDriver):
        pytest.skip(driver.reason)
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA: the reference must run on the card too")
    return Bare(folder, photographs, driver.devices[0])


def find_card(folder: Path, photographs: Path) -> Card:
    """Find a card and a TensorRT that compiles for it, or skip with what is missing."""
    bare = find_bare(folder, photographs)
    if obstacle := no_engines(bare.device):
        pytest.skip(obstacle)
    return Card(folder, photographs, bare.device, find_backend())


def no_engines(device: Device) -> str:
    """Say why no TensorRT here compiles for a card; empty where one must."""
    try:
        backend = find_backend()
    except MissingPackageError as error:
        return str(error)
    unknown = backend.row.targets_capabilities and not may_target(device.capability)
    if unknown and not tries_any_gpu():
        return (
            f"{backend} is for no GPU of SM {device.capability}; {ANY_GPU}=1 tries engines that "
            "name no target"
        )
    return ""


FOUND = {"card": find_card, "card without TensorRT": find_bare}
