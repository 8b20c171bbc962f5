"""The runner's calls of CUDA, through the real cuda-bindings, reach the driver as they are meant.

The driver is a library that answers with the stand-in; the bindings between are the real ones.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import driver_library

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here"),
    pytest.mark.skipif(
        importlib.util.find_spec("cuda.bindings") is None, reason="cuda-bindings is not installed"
    ),
]


def test_the_runners_tests_pass_through_the_real_bindings(tmp_path) -> None:
    driver_library.make(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.fakes.with_real_bindings",
         "-p", "no:cacheprovider", "-m", "not gpu", "-n", "0", "-k", "not whichever and not bare",
         "tests/runtime/test_tensorrt.py", "tests/runtime/test_tensorrt_streams.py"],
        env=driver_library.environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "not called: cuMemGetInfo" in run.stdout.splitlines()


LACKING = """
from tests.fakes import driver_library
driver_library.FUNCTIONS.pop("cuDevicePrimaryCtxRetain")
library = driver_library.DriverLibrary()
from cuda.bindings import driver
from msn_export.errors import DeviceError
from msn_export.runtime.cuda import Gpu
try:
    Gpu(driver, 0)
except DeviceError as error:
    print(error)
"""


def test_a_driver_that_lacks_a_function_is_too_old(tmp_path) -> None:
    driver_library.make(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", LACKING],
        env=driver_library.environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout == (
        "cuDevicePrimaryCtxRetain failed: function cuDevicePrimaryCtxRetain is not found; the "
        "NVIDIA driver is too old for these cuda-bindings: update it, or install cuda-bindings of "
        "its CUDA version\n"
    ), run.stderr
