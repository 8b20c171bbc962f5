"""What an engine that TensorRT refuses says."""

import re
from types import SimpleNamespace

import pytest

from msn_export.errors import DeviceError
from msn_export.runtime.engine import Engine
from msn_export.runtime.versions import VERSIONS, LoadedTensorRT


class Runtime:
    """Refuses every engine, after ten errors and a warning."""

    def __init__(self, log) -> None:
        self.log = log

    def deserialize_cuda_engine(self, _plan: bytes) -> None:
        for number in range(10):
            self.log.log(SimpleNamespace(name="ERROR"), f"error\n {number}")
        self.log.log(SimpleNamespace(name="WARNING"), "careful")


def test_the_last_eight_errors_are_quoted() -> None:
    loaded = LoadedTensorRT(SimpleNamespace(ILogger=object, Runtime=Runtime), VERSIONS[0], "1.7")
    quoted = "; ".join(f"error {number}" for number in range(2, 10))
    with pytest.raises(DeviceError, match=re.escape(f"{loaded} refuses m.engine: {quoted}") + "$"):
        Engine(loaded, b"", "m.engine", compatible=False)
