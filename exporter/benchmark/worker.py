"""A contender's process: its own memory, its own threads, and stopped while it is not its turn.

A request comes in as a line of JSON on stdin, its answer goes out as one on a pipe of its own:
libraries print on stdout and stderr as they like. It never outlives its parent.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.benchmark.contenders import open_timed
from msn_export.child_process import ChildProcess, last_line
from msn_export.errors import BenchError, MsnExportError
from msn_export.host import end_with, peak_rss, reset_peak, signal_name
from msn_export.metrics.samples import Sample
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain
from msn_export.spec import InputFormat

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


CONTENDER = "msn_export.benchmark.worker"
_ENDING = 10  # seconds a process that closed its pipe may take to end
# Each library of linear algebra reads a name of its own
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process(ChildProcess):
    """A process that runs ``msn_export.benchmark.worker`` and answers one request at a time.

    Args:
        name: of the contender, for messages.
        log: receives all that it and its libraries print.
        threads: it may compute on.
        offline: it may fetch nothing from the hub.
    """

    def __init__(self, name: str, log: Path, threads: int, *, offline: bool) -> None:
        self.name, self._log = name, log
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        with log.open("wb") as file:
            super().__init__(CONTENDER, file, environment)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, let the process run until it has answered, and stop it again.

        A thread pool that waits for work spins: it would take the next contender's cores.
        """
        self.process.send_signal(signal.SIGCONT)
        try:
            self.send({"request": request, **arguments})
            answer = self.messages.readline()
        finally:
            self.process.send_signal(signal.SIGSTOP)
        if not answer:
            raise BenchError(f"{self.name}: {self._end()}")
        found: dict[str, Any] = json.loads(answer)
        if "failed" in found:
            raise BenchError(f"{self.name}: {found['failed']}")
        return found

    def _end(self) -> str:
        # it was stopped, maybe while it was ending: what it does not end by itself is ended
        self.process.send_signal(signal.SIGCONT)
        try:
            code = self.process.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"its process answered nothing more and did not end in {_ENDING} s"
        with self._log.open("rb") as file:
            line = last_line(file)
        last = f"; its last line: {line}" if line else ""
        if code == -signal.SIGKILL:
            return f"its process was killed, most likely because memory ran out{last}"
        if code < 0:
            return f"its process crashed ({signal_name(code)}){last}"
        return f"its process ended (exit {code}){last}"


_FEEDS = 4  # different batches that calls go through in turn: one alone would stay in the caches


class Server:
    """Answers requests about one contender."""

    def __init__(self) -> None:
        self._timed: Any = None
        self._sample: Sample | None = None
        self._feeds: list[Any] = []

    def open(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Open what is to be timed."""
        started = time.monotonic()
        self._timed = open_timed(told)
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
        """Say the highest resident memory since ``begin``, and how CUDA graphs were used."""
        return {"peak_rss_bytes": peak_rss(), "cuda_graphs": self._timed.cuda_graphs}

    def _feed(self, indices: range) -> Any:
        assert self._sample is not None
        pixels = self._sample.feed(indices, InputFormat.UINT8)
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
        return {
            "failed": f"package {error.name} is not installed; pip install 'msn-export[export]'"
        }
    except MemoryError:
        return {"failed": "there is not enough memory"}
    except Exception as error:  # noqa: BLE001  torch raises what it likes; the log has it all
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "no message")
        return {"failed": f"{type(error).__name__}: {first[:300]}"}


if __name__ == "__main__":
    main()
