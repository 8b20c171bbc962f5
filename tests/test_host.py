"""A driver is found, or the sentence says why none is; through a library made of real symbols."""

import shutil
import subprocess
from pathlib import Path

import pytest

from msn_export.host import Device, Driver, NoDriver, find_driver, this_machine
from msn_export.spec import ComputeCapability

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")

# The functions of cuda.h that are called, with their real signatures: a stand-in for libcuda.so.1
SOURCE = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    if (device < 40) return 101;
    strncpy(name, device == 40 ? "NVIDIA \\xff L4" : "NVIDIA H200", length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) *value = device == 40 ? 8 : 9;
    else if (attribute == 76) *value = device == 40 ? 9 : 0;
    else return 1;
    return 0;
}
int cuGetErrorName(int code, const char **text) {
    if (code != 100) return 1;
    *text = "CUDA_ERROR_NO_DEVICE";
    return 0;
}
"""


def library(folder: Path, source: str = SOURCE, count: int = 2, init: int = 0) -> str:
    path = folder / "libcuda.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-DCOUNT={count}", f"-DINIT={init}", "-xc", "-", "-o", path],
        input=source.encode(),
        check=True,
        capture_output=True,
    )
    return str(path)


def reason(found: Driver | NoDriver) -> str:
    assert isinstance(found, NoDriver)
    return found.reason


@needs_compiler
def test_a_driver_tells_its_version_and_its_devices(tmp_path) -> None:
    memory = 24 << 30
    assert find_driver(library(tmp_path)) == Driver(
        "13.2",
        (
            Device(0, "NVIDIA \ufffd L4", ComputeCapability(8, 9), memory),
            Device(1, "NVIDIA H200", ComputeCapability(9, 0), memory),
        ),
    )


def test_without_a_driver_the_library_is_named() -> None:
    assert reason(find_driver("libcuda-that-is-not.so")) == (
        "no NVIDIA driver (libcuda-that-is-not.so cannot be loaded)"
    )


@needs_compiler
def test_a_driver_that_sees_no_device_is_none(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = library(tmp_path, count=0)
    assert reason(find_driver(path)) == "the NVIDIA driver sees no GPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert reason(find_driver(path)) == "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES='')"


@needs_compiler
def test_hidden_devices_are_told_where_the_driver_does_not_even_start(
    tmp_path, monkeypatch
) -> None:
    # cuInit gives CUDA_ERROR_NO_DEVICE, 100, where CUDA_VISIBLE_DEVICES hides all
    path = library(tmp_path, init=100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert reason(find_driver(path)) == "the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES='7')"


@needs_compiler
def test_a_driver_that_fails_is_quoted(tmp_path) -> None:
    assert reason(find_driver(library(tmp_path, init=999))) == (
        "the NVIDIA driver does not work (cuInit: unknown, error 999)"
    )


@needs_compiler
def test_a_library_that_is_no_driver_is_told(tmp_path) -> None:
    found = find_driver(library(tmp_path, "int something(void) { return 0; }"))
    assert reason(found).startswith("the NVIDIA driver does not work (")
    assert "undefined symbol: cuInit" in reason(found)


@pytest.mark.parametrize(
    ("text", "instructions"),
    [
        (
            "flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n",
            "avx2, avx512f, avx512_vnni, amx_int8",
        ),
        ("Features\t: fp asimd bf16 i8mm\n", "asimd, i8mm, bf16"),
        ("processor\t: 0\n", ""),
    ],
)
def test_a_machine_is_named_with_the_instructions_of_its_processor(
    monkeypatch, text, instructions
) -> None:
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, **how: text if str(self) == "/proc/cpuinfo" else read(self, **how),
    )
    found = this_machine()
    assert ", ".join(found.instructions) == instructions
    assert (f"({instructions})" in str(found)) == bool(instructions)
