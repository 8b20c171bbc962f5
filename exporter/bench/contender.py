"""What can be timed, opened in its own process: an artifact, or the PyTorch reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from msn_export.models.named import Choices
from msn_export.records import from_plain, to_plain
from msn_export.spec import ImageSize, InputKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from msn_export.preprocessing import Preprocessing


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


class Artifact:
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
        from msn_export.feed import Feed

        spec = self._runner.inputs[0]
        feed = Feed(InputKind.of(spec.dtype), spec.dtype, preprocessing)(pixels)
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

        from msn_export.bench.torch_reference import open_reference

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
    """Open what a request describes.

    Raises:
        MsnExportError: it cannot be opened.
    """
    return Torch(told) if told["kind"] == "torch" else Artifact(told)
