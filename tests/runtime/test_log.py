"""A module has one logger for the life of the process, and an engine the errors that are its own.

TensorRT keeps the first logger that it is given. So each test with the real TensorRT-RTX has a
process to itself, which begins without one.
"""

import importlib.util
import subprocess
import sys
import threading

import pytest

from msn_export.runtime.log import EngineErrors, logger_of
from tests.fakes import tensorrt_stand_in as stand_in
from tests.fakes.cuda_stand_in import CudaStandIn

REAL = """
import ctypes, gc
trt = __import__("tensorrt_rtx")
from msn_export.errors import DeviceError
from msn_export.runtime.engine import Engine
from msn_export.runtime.versions import VERSIONS, LoadedTensorRT

loaded = LoadedTensorRT(trt, VERSIONS[0], trt.__version__)
library = ctypes.CDLL("libtensorrt_rtx.so.1")
library.getLogger.restype = ctypes.c_void_p

def refused(plan, file):
    try:
        Engine(loaded, plan, file, compatible=False)
    except DeviceError as error:
        return error  # the frames of its traceback hold the runtime

def address(logger):  # of the C++ object: behind PyObject's head (pybind11, struct instance)
    return ctypes.c_void_p.from_address(id(logger) + object.__basicsize__).value
"""


def run(code: str) -> list[str]:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    done = subprocess.run(
        [sys.executable, "-c", REAL + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_real_tensorrt_keeps_a_logger_that_is_alive_when_the_first_engine_is_gone() -> None:
    (alive,) = run(
        "first = refused(b'ftrt' + bytes(400), 'a.engine')\n"
        "second = refused(b'x', 'b.engine')\n"
        "del first\n"
        "gc.collect()\n"
        "from msn_export.runtime import log\n"
        "print([address(one) for one in log._LOGGERS.values()] == [library.getLogger()])\n"
    )
    assert alive == "True"


def test_the_real_tensorrt_reports_the_errors_of_each_engine_to_it() -> None:
    magic, short = run(
        "print(refused(b'ftrt' + bytes(400), 'a.engine'))\nprint(refused(b'x', 'b.engine'))\n"
    )
    assert "refuses a.engine: " in magic
    assert "magicTag" in magic
    assert "refuses b.engine: " in short
    assert "it does not say why" not in short
    assert "magicTag" not in short


def test_another_logger_that_came_first_hides_no_error() -> None:
    """A library that loaded TensorRT before has set its own for the process."""
    (told,) = run(
        "other = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))\n"
        "print(refused(b'ftrt' + bytes(400), 'a.engine'))\n"
    )
    assert "magicTag" in told


def test_the_real_logger_prints_nothing() -> None:
    printed = run(
        "from msn_export.runtime.log import logger_of\n"
        "logger = logger_of(trt)\n"
        "logger.log(trt.ILogger.INTERNAL_ERROR, 'printed')\n"
        "print(logger is logger_of(trt), trt.Runtime(logger).logger is logger)\n"
    )
    assert printed == ["True True"]


def test_a_severity_that_cannot_be_made_leaves_internal_errors() -> None:
    trt = stand_in.tensorrt_stand_in(CudaStandIn(), "strategy")
    assert logger_of(trt).min_severity == stand_in.Severity.INTERNAL_ERROR
    assert logger_of(trt) is logger_of(stand_in.tensorrt_stand_in(CudaStandIn(), "bare"))


def report(errors: EngineErrors, text: str, *, elsewhere: bool = False) -> None:
    def tell() -> None:
        errors.recorder.report_error(stand_in.ErrorCodeTRT.UNSPECIFIED_ERROR, text)

    if elsewhere:
        thread = threading.Thread(target=tell)
        thread.start()
        thread.join()
    else:
        tell()


def test_a_call_quotes_what_its_own_thread_reported() -> None:
    errors = EngineErrors(stand_in.tensorrt_stand_in(CudaStandIn(), "strategy"))
    report(errors, "of another call", elsewhere=True)
    report(errors, "of\n this one")
    assert errors.quote() == "of this one"
    assert errors.quote() == "of another call"  # it may be a thread of TensorRT's own
    assert errors.quote() == "it does not say why"


def test_a_recorder_answers_what_tensorrt_asks() -> None:
    errors = EngineErrors(stand_in.tensorrt_stand_in(CudaStandIn(), "strategy"))
    for number in range(10):
        report(errors, f"error {number}")
    recorder = errors.recorder
    assert recorder.num_errors() == recorder.get_num_errors() == 8
    assert recorder.get_error_desc(0) == "error 2"
    assert recorder.get_error_desc(8) == ""
    assert recorder.get_error_code(0) is stand_in.ErrorCodeTRT.UNSPECIFIED_ERROR
    assert not recorder.has_overflowed()
    recorder.clear()
    assert recorder.num_errors() == 0
