"""A plugin of pytest: the runner's tests call the stand-in for CUDA through the real cuda-bindings.

For a process that found the library of ``driver_library`` (``-p tests.fakes.with_real_bindings``).
"""

from typing import Any

from cuda.bindings import driver

from msn_export.runtime.tensorrt import EngineHost
from tests.builders import trt_bench
from tests.fakes.driver_library import FUNCTIONS, DriverLibrary

LIBRARY = DriverLibrary()


class BoundBench(trt_bench.Bench):
    """A bench whose calls of CUDA go through the bindings."""

    def __init__(self, contexts: str, **stand_in: Any) -> None:
        super().__init__(contexts, **stand_in)
        LIBRARY.device = self.stand_in
        self.machine = EngineHost(
            self.recorder.cuda(driver), self.machine.loaded, self.machine.device
        )


trt_bench.Bench = BoundBench  # type: ignore[misc]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which functions no test reached, so that the test that started this can require none."""
    missed = sorted(set(FUNCTIONS) - LIBRARY.called)
    terminalreporter.write_line(f"not called: {', '.join(missed) or 'none'}")
