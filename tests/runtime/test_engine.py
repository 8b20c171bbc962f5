"""An engine that TensorRT refuses or loads: what is quoted, and what it is allowed."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from msn_export.errors import DeviceError
from msn_export.runtime.engine import Engine
from msn_export.runtime.versions import VERSIONS, LoadedTensorRT
from tests.builders.networks import Network
from tests.builders.trt_bench import Bench
from tests.fakes import tensorrt_stand_in as stand_in


class Refusing:
    """A runtime that refuses every engine, after ten errors."""

    error_recorder: Any = None

    def __init__(self, _logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, _plan: bytes) -> None:
        for number in range(10):
            self.error_recorder.report_error(None, f"error\n {number}")


def test_the_last_eight_errors_are_quoted() -> None:
    names = {kind.__name__: kind for kind in stand_in.COMMON}
    loaded = LoadedTensorRT(SimpleNamespace(**names, Runtime=Refusing), VERSIONS[0], "1.7")
    quoted = "; ".join(f"error {number}" for number in range(2, 10))
    with pytest.raises(DeviceError, match=re.escape(f"{loaded} refuses m.engine: {quoted}") + "$"):
        Engine(loaded, b"", "m.engine", compatible=False)


@pytest.mark.parametrize(
    "row",
    [row for row in VERSIONS if row.contexts == "strategy"],
    ids=lambda row: f"{row.module} {row.since}",
)
@pytest.mark.parametrize("compatible", [False, True])
def test_a_version_compatible_engine_may_run_its_host_code_in_every_runtime(
    row, compatible
) -> None:
    bench = Bench("strategy")
    loaded = replace(bench.machine.loaded, row=row)
    bench.stand_in.cuCtxPushCurrent(77)
    plan = bench.plan(Network())
    engine = Engine(loaded, plan, "m.engine", compatible=compatible)
    assert engine._runtime.engine_host_code_allowed is compatible
