"""A contender's process: ``python -m msn_export.benchmark.worker``; ``session`` starts it.

It has its own memory and its own threads, and is stopped while it is not its turn.
"""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from msn_export import images
from msn_export.benchmark.contenders import INPUTS, TORCH, Origin, Placement
from msn_export.errors import CheckpointError, SpecError
from msn_export.host import peak_rss, reset_peak, serve
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_plain
from msn_export.spec import Head, InputFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from msn_export.graph.torch_reference import Heads
    from msn_export.models.vit import AttentionKind


class ArtifactContender:
    """An .onnx or .engine file, through the runtime."""

    def __init__(self, request: Mapping[str, Any], placement: Placement) -> None:
        from msn_export.runtime import open_runner

        path: str = request["path"]
        is_graph = path.endswith(".onnx")
        providers = placement.providers if is_graph else ()
        self._runner = open_runner(
            path,
            device=placement.device,
            providers=providers or None,
            trust=placement.trust,
            threads=placement.threads,
            precision=placement.precision if is_graph else None,
            cuda_graphs=placement.cuda_graphs,
            eager_kernels=True,  # no kernel changes while it is timed
        )
        self._resident = placement.resident
        self._device = placement.device or 0

    def description(self) -> dict[str, Any]:
        runner = self._runner
        return {
            "runs": runner.name,
            "inputs": to_plain(runner.inputs),
            "outputs": to_plain(runner.outputs),
            "batch": str(runner.batch),
            "precision": str(runner.precision or ""),
        }

    @property
    def cuda_graphs(self) -> str | None:
        """The way an engine's kernels are replayed; a graph's runner replays none."""
        return getattr(self._runner, "cuda_graphs", None)

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make the artifact's own input of pictures [b, h, w, c]; this is not timed."""
        spec = self._runner.inputs[0]
        batch = images.model_input(pixels, preprocessing, InputFormat.of(spec.dtype))
        if not self._resident:
            return batch
        import torch

        return torch.from_numpy(batch).to(f"cuda:{self._device}")

    def call(self, batch: Any) -> Mapping[str, Any]:
        """Run it; outputs that stay on the GPU are waited for."""
        outputs = self._runner(batch)
        if self._resident:
            import torch

            torch.cuda.synchronize(self._device)
        return outputs


class TorchContender:
    """The PyTorch reference, its attention written out (eager) or fused (sdpa), or compiled."""

    cuda_graphs = None  # PyTorch launches kernel by kernel here, compiled or not

    def __init__(self, request: Mapping[str, Any], placement: Placement) -> None:
        import torch

        torch.set_num_threads(placement.threads)
        self._torch = torch
        self._device, self._resident = placement.torch_device, placement.resident
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[
            request["dtype"]
        ]
        attention, compiled = TORCH[request["kind"]]
        reference = open_reference(from_plain(Origin, request["origin"], "origin"), attention)
        self._names = [head.output for head in reference.heads]
        model = reference.to(self._device, self._dtype)
        self._model = torch.compile(model, dynamic=False) if compiled else model

    def description(self) -> dict[str, Any]:
        return {
            "runs": f"torch {self._torch.__version__}, {self._device}",
            "outputs": self._names,
        }

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make normalised planes of pictures [b, h, w, c]; this is not timed."""
        planes = self._torch.from_numpy(images.normalize(pixels, preprocessing))
        return planes.to(self._device, self._dtype) if self._resident else planes.to(self._dtype)

    def call(self, batch: Any) -> Mapping[str, Any]:
        with self._torch.inference_mode():
            outputs = self._model(batch.to(self._device))
            if self._resident:
                self._torch.cuda.synchronize(self._device)
            else:
                outputs = [value.float().cpu().numpy() for value in outputs]
            return dict(zip(self._names, outputs, strict=True))


def open_reference(origin: Origin, attention: AttentionKind) -> Heads:
    """Load a checkpoint as the model whose outputs the artifacts have, at their image size."""
    import torch

    from msn_export.graph.torch_reference import Heads
    from msn_export.models.checkpoint import load_checkpoint
    from msn_export.models.config import LinearClassifier
    from msn_export.models.vit import VitMsn

    loaded = load_checkpoint(origin.checkpoint, origin.choices)
    if origin.sha256 is not None and loaded.sha256 != origin.sha256:
        raise CheckpointError(
            f"checkpoint {origin.checkpoint} has other weights ({loaded.sha256[:12]}…) than the "
            f"artifact was made from ({origin.sha256[:12]}…); name the right one with "
            "--checkpoint, or what holds its weights with --weights"
        )
    heads = [head for head in Head if head.output in origin.outputs]
    if not heads:
        raise SpecError(
            f"the artifact's outputs ({', '.join(origin.outputs)}) are none of "
            f"{', '.join(head.output for head in Head)}: there is nothing to compare"
        )
    model = loaded.model
    if origin.classifier is not None:
        rows = np.load(origin.classifier, allow_pickle=False)
        names = tuple(map(str, range(len(rows))))
        model = model.with_classifier(
            LinearClassifier(rows, names, origin.pooling, origin.pooled_blocks)
        )
    # not compare.sides: that brings onnxruntime, and the memory of this process is measured
    size = (origin.size.height, origin.size.width)
    if size != model.config.image_size:
        model = model.for_image_size(size)
    config = replace(
        model.config, kept=origin.kept, blocks=origin.blocks, normalize=origin.normalize
    )
    if config != model.config:
        model = model.with_config(config)
    if attention != model.attention:
        with torch.device("meta"):
            other = VitMsn(model.config, attention=attention)
        other.load_state_dict(model.state_dict(keep_vars=True), assign=True)  # weights are shared
        model = other.eval()
    return Heads(model, heads).eval()


Timed: TypeAlias = ArtifactContender | TorchContender


class Server:
    _timed: Timed
    _pixels: NDArray[np.uint8]
    _preprocessing: Preprocessing

    def __init__(self) -> None:
        self._inputs: list[Any] = []

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        placement = from_plain(Placement, request["placement"], "placement")
        kind = TorchContender if request["kind"] in TORCH else ArtifactContender
        self._timed = kind(request, placement)
        return {**self._timed.description(), "seconds": time.monotonic() - started}

    def set_images(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._pixels = np.load(request["pixels"], allow_pickle=False)
        plain = request["preprocessing"]
        self._preprocessing = from_plain(Preprocessing, plain, "preprocessing")
        return {}

    def warm_up(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a batch size: run every picture once (its outputs go to a file), keep inputs."""
        reset_peak()
        batch, count = request["batch"], len(self._pixels)
        started = time.monotonic()
        parts = [self._outputs(range(at, at + batch)) for at in range(0, count, batch)]
        outputs = {
            name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]
        }
        with Path(request["outputs"]).open("wb") as file:
            np.savez(file, **outputs)  # type: ignore[arg-type]
        starts = [start * batch for start in range(INPUTS)]
        self._inputs = [self._input(range(start, start + batch)) for start in starts]
        return {"seconds": time.monotonic() - started}

    def time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take a turn: one call that is not counted, then calls until the time is spent."""
        self._timed.call(self._inputs[-1])  # the caches are those of whoever ran before
        times: list[int] = []
        gc.collect()
        gc.disable()
        try:
            until = time.perf_counter_ns() + int(request["seconds"] * 1e9)
            while not times or time.perf_counter_ns() < until:
                batch = self._inputs[len(times) % len(self._inputs)]
                began = time.perf_counter_ns()
                self._timed.call(batch)
                times.append(time.perf_counter_ns() - began)
        finally:
            gc.enable()
        return {"nanoseconds": times}

    def memory(self, request: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  as the others
        """Give the highest resident memory since ``warm_up``, and how CUDA graphs were used."""
        return {"peak_rss_bytes": peak_rss(), "cuda_graphs": self._timed.cuda_graphs}

    def _input(self, indices: range) -> Any:
        """Prepare a batch; indices past the last picture start over."""
        pixels = self._pixels[np.asarray(indices) % len(self._pixels)]
        return self._timed.prepare(pixels, self._preprocessing)

    def _outputs(self, indices: range) -> dict[str, NDArray[Any]]:
        outputs = self._timed.call(self._input(indices))
        return {name: _on_host(value) for name, value in outputs.items()}


def _on_host(value: Any) -> NDArray[Any]:
    host = value.float().cpu().numpy() if hasattr(value, "cpu") else np.asarray(value)
    return np.array(host, np.float32)  # a copy: a runner may use its buffers again


def main() -> None:
    server = Server()
    requests: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "open": server.open,
        "set_images": server.set_images,
        "warm_up": server.warm_up,
        "time": server.time,
        "memory": server.memory,
    }
    serve(lambda request, _send: requests[request["request"]](request), _failure)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, ModuleNotFoundError):
        return {
            "failed": f"package {error.name} is not installed; pip install 'msn-export[export]'"
        }
    if isinstance(error, MemoryError):
        return {"failed": "there is not enough memory"}
    first = next(iter(str(error).strip().splitlines()), "no message")
    return {"failed": f"{type(error).__name__}: {first[:300]}"}


if __name__ == "__main__":
    main()
