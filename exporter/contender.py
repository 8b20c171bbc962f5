"""A contender of a benchmark, in its process: ``python -m msn_export.contender``.

``bench/process.py`` starts it. A request comes in as a line of JSON on stdin, its answer goes out
as one on a pipe of its own: libraries print on stdout and stderr as they like. It never outlives
its parent.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.check.sample import Sample
from msn_export.errors import MsnExportError
from msn_export.preprocessing import Preprocessing
from msn_export.process import end_with, peak_rss, reset_peak
from msn_export.records import from_plain, to_plain
from msn_export.spec import ImageSize, InputKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

_FEEDS = 4  # different batches that calls go through in turn: one alone would stay in the caches


class Timed(Protocol):
    """What is timed: ``prepare`` puts a batch where a call takes it from, uncounted."""

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
        )
        self._resident = told["resident"]
        self._device = told["device"] or 0

    def described(self) -> dict[str, Any]:
        """Say what was opened."""
        runner = self._runner
        graph = getattr(runner, "cuda_graph", None)
        return {
            "runs": runner.name,
            "inputs": to_plain(runner.inputs),
            "outputs": to_plain(runner.outputs),
            "batch": str(runner.batch),
            "cuda_graph": None if graph is None else str(graph),
        }

    def prepare(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
        """Make the artifact's own input."""
        from msn_export.feed import Feed

        spec = self._runner.inputs[0]
        kind = InputKind.UINT8 if spec.dtype == "uint8" else InputKind.FLOAT
        feed = Feed(kind, spec.dtype, preprocessing)(pixels)
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

        from msn_export.torch_reference import open_reference

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
        )
        self._names = [head.output for head in reference.heads]
        model = reference.to(self._device, self._dtype)
        self._model = torch.compile(model, dynamic=False) if told["compile"] else model

    def described(self) -> dict[str, Any]:
        """Say what was opened."""
        where = self._device if self._device != "cpu" else "cpu"
        return {"runs": f"torch {self._torch.__version__}, {where}", "outputs": self._names}

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


class Server:
    """Answers requests about one contender."""

    def __init__(self) -> None:
        self._timed: Any = None
        self._sample: Sample | None = None
        self._feeds: list[Any] = []

    def open(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Open what is to be timed."""
        kinds: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "artifact": Artifact,
            "torch": Torch,
        }
        started = time.monotonic()
        self._timed = kinds[told["kind"]](told)
        return {**self._timed.described(), "seconds": time.monotonic() - started}

    def take(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Take the pictures that are run."""
        pixels = np.load(told["pixels"], allow_pickle=False)
        preprocessing = from_plain(Preprocessing, told["preprocessing"], "preprocessing")
        self._sample = Sample(pixels, (), "", preprocessing)
        return {"pictures": len(pixels)}

    def begin(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a batch size: run every picture once (its outputs go to a file), keep inputs."""
        assert self._sample is not None
        reset_peak()
        batch, sample = told["batch"], self._sample
        started = time.monotonic()
        parts = [
            self._outputs(range(start, start + batch)) for start in range(0, len(sample), batch)
        ]
        outputs = {
            name: np.concatenate([part[name] for part in parts])[: len(sample)] for name in parts[0]
        }
        with Path(told["outputs"]).open("wb") as file:
            np.savez(file, **outputs)  # type: ignore[arg-type]
        starts = [start * batch for start in range(_FEEDS)]
        self._feeds = [self._feed(range(start, start + batch)) for start in starts]
        return {"seconds": time.monotonic() - started}

    def time(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Take a turn: one call that is not counted, then calls until the time is spent."""
        self._timed.call(self._feeds[-1])  # the caches are those of whoever ran before
        times: list[int] = []
        gc.collect()
        gc.disable()
        try:
            until = time.perf_counter_ns() + int(told["seconds"] * 1e9)
            while not times or time.perf_counter_ns() < until:
                feed = self._feeds[len(times) % len(self._feeds)]
                began = time.perf_counter_ns()
                self._timed.call(feed)
                times.append(time.perf_counter_ns() - began)
        finally:
            gc.enable()
        return {"nanoseconds": times}

    def weigh(self, told: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  as the others
        """Say the highest resident memory since ``begin``."""
        return {"peak_rss_bytes": peak_rss()}

    def _feed(self, indices: range) -> Any:
        assert self._sample is not None
        pixels = self._sample.feed(indices, InputKind.UINT8)
        return self._timed.prepare(pixels, self._sample.preprocessing)

    def _outputs(self, indices: range) -> dict[str, NDArray[Any]]:
        found = self._timed.call(self._feed(indices))
        return {name: _on_host(value) for name, value in found.items()}


def _on_host(value: Any) -> NDArray[Any]:
    host = value.float().cpu().numpy() if hasattr(value, "cpu") else np.asarray(value)
    return np.array(host, np.float32)  # a copy: a runner may use its buffers again


def main() -> None:
    """Answer until there are no more requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    server = Server()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            told = json.loads(line)
            end_with(told["parent"])
            answers.write(json.dumps(_answer(server, told)) + "\n")
            answers.flush()


def _answer(server: Server, told: dict[str, Any]) -> dict[str, Any]:
    requests = {
        "open": server.open,
        "take": server.take,
        "begin": server.begin,
        "time": server.time,
        "weigh": server.weigh,
    }
    try:
        return requests[told["request"]](told)
    except MsnExportError as error:
        return {"failed": str(error)}
    except ModuleNotFoundError as error:
        traceback.print_exc()
        return {"failed": f"package {error.name} is not installed"}
    except MemoryError:
        return {"failed": "there is not enough memory"}
    except Exception as error:  # noqa: BLE001  torch raises what it likes; the log has it all
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return {"failed": f"{type(error).__name__}: {first[:300]}"}


if __name__ == "__main__":
    main()
