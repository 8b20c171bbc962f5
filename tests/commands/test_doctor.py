"""``msn-export doctor``: what is broken is named with the line that mends it, and exits with 1."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from msn_export.cli import main
from msn_export.commands.doctor import (
    ABILITIES,
    COMPILER,
    Finding,
    ImportProbe,
    Wanted,
    decide,
    find_faults,
)
from msn_export.host import Device, Driver, NoDriver, driver_release
from msn_export.spec import ComputeCapability
from tests.fakes.installed import install

NO_DRIVER = NoDriver("no NVIDIA driver (libcuda.so.1 cannot be loaded)")


def driver(cuda: str) -> Driver:
    return Driver(cuda, (Device(0, "a card", ComputeCapability(8, 9), 2**34),))


ORT = Wanted("onnxruntime-gpu", ">=1.25", ("ort",), "1.31.1", module="onnxruntime")
CUDA = Wanted("cuda-bindings", ">=13", ("rtx",), "13.5.0", module="cuda.bindings")
TENSORRT = Wanted("tensorrt", ">=10.14", ("tensorrt",), "11.4.0", module="tensorrt")
RTX = Wanted("tensorrt-rtx", ">=1.5", ("rtx",), "1.7.1", module="tensorrt_rtx")


def faults(package, *, fault=None, found=NO_DRIVER, providers=None):
    probes = {package.module: ImportProbe(package.module, fault, "")}
    return find_faults([package], probes, found, providers or {})


def test_two_onnxruntimes_are_a_fault_that_no_import_shows() -> None:
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    (found,) = faults(ORT, providers=both)
    assert "onnxruntime and onnxruntime-gpu both install the module onnxruntime" in found.what
    assert found.mend == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.25'"
    )
    assert faults(ORT, providers={"onnxruntime": ["onnxruntime-gpu"]}) == ()


def test_libraries_that_are_a_stub_are_said_to_be_one() -> None:
    lost = "ImportError: libnvinfer.so.11: cannot open shared object file: No such file"
    (found,) = faults(TENSORRT, fault=lost)
    assert found.what == lost
    assert "tensorrt-cu13-libs" in found.mend
    assert "a stub that downloads the libraries" in found.mend
    lost = "ImportError: libtensorrt_rtx.so.1: cannot open shared object file"
    (found,) = faults(RTX, fault=lost)
    assert found.mend == "pip install --force-reinstall --no-deps tensorrt-rtx-cu13-libs"


def test_cuda_bindings_of_13_need_a_driver_that_knows_cuda_13() -> None:
    (found,) = faults(CUDA, found=driver("12.8"))
    assert "13.5.0 needs an NVIDIA driver r580 or later; the one here ends at CUDA 12.8" in (
        found.what
    )
    assert faults(CUDA, found=driver("13.0")) == ()
    assert faults(CUDA, found=NO_DRIVER) == ()


def test_a_version_outside_the_range_is_a_fault() -> None:
    old = Wanted("torch", ">=2.9", ("export",), "2.1", fits=False, module="torch")
    (found,) = faults(old)
    assert found == Finding(
        "torch", "2.1 is installed, >=2.9 is needed", "pip install 'torch>=2.9'"
    )


def test_an_onnxruntime_without_attention_on_the_gpu_is_a_fault_with_its_reason() -> None:
    old = replace(ORT, version="1.24.4", fits=False)
    (found,) = faults(old)
    assert found == Finding(
        "onnxruntime-gpu",
        "1.24.4 is installed, >=1.25 is needed: the CUDA provider of an older one has no kernel "
        "for Attention, which then runs on the CPU",
        "pip install 'onnxruntime-gpu>=1.25'",
    )
    (found,) = faults(replace(old, stand_in="onnxruntime"))
    assert found.mend == "pip install 'onnxruntime>=1.25'"  # and not the other beside it


def test_every_command_that_there_is_is_judged() -> None:
    assert set(main.commands) <= {ability.command for ability in ABILITIES}


def verdicts(*packages, found=NO_DRIVER, broken=(), tools=None):
    judged = decide(["trt", "embed", "bench"], packages, broken, found, tools or {})
    return {(verdict.command, verdict.does): verdict for verdict in judged}


def test_what_a_command_lacks_is_one_line() -> None:
    missing = Wanted("tensorrt-rtx", ">=1.5", ("rtx",))
    judged = verdicts(ORT, missing)
    assert judged["embed", "an .onnx file"].works
    rtx = judged["embed", "an engine of TensorRT-RTX"]
    assert not rtx.works
    assert rtx.mend == "pip install 'msn-export[rtx]'; an NVIDIA GPU with its driver"
    assert verdicts(ORT, RTX, found=driver("13.0"))["embed", "an engine of TensorRT-RTX"].works


def test_a_broken_package_breaks_what_needs_it_and_no_more() -> None:
    fault = Finding("tensorrt-rtx", "broken", "mend it")
    judged = verdicts(ORT, RTX, broken=(fault,))
    assert judged["trt", "compile with TensorRT-RTX"].mend == "mend it"
    assert judged["embed", "an .onnx file"].works


def test_compile_needs_a_compiler() -> None:
    judged = verdicts(ORT, tools={COMPILER: "apt-get install g++"})
    assert judged["bench", "--against compile"].mend == "apt-get install g++"
    assert verdicts(ORT, tools={COMPILER: None})["bench", "--against compile"].works


def test_the_other_onnxruntime_is_not_told_to_be_installed_beside_the_first() -> None:
    other = Wanted(
        "onnxruntime-gpu",
        ">=1.25",
        ("ort",),
        "1.31.1",
        module="onnxruntime",
        stand_in="onnxruntime",
    )
    judged = verdicts(other, found=driver("13.0"))
    assert judged["embed", "an .onnx file"].works
    assert judged["embed", "an .onnx file on a GPU"].mend == (
        "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
    with_plugin = verdicts(replace(other, plugin="onnxruntime-ep-cuda13"), found=driver("13.0"))
    assert with_plugin["embed", "an .onnx file on a GPU"].works


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
            "580.95.05",
        ),
        ("something else\n", None),
    ],
)
def test_the_release_of_the_driver_is_read(text, release, tmp_path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_release(tmp_path / "version") == release


def run_doctor(site: Path | None, *options: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else dict(os.environ)
    return subprocess.run(
        [sys.executable, "-m", "msn_export", "doctor", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_installation_exits_with_1_and_names_each_fault(tmp_path) -> None:
    install(
        tmp_path,
        "onnxruntime",
        "1.31.1",
        {"onnxruntime/__init__.py": "def get_available_providers(): return []"},
    )
    install(tmp_path, "tensorrt", "11.4.0", {}, ("tensorrt-cu13==11.4.0",))
    crash = "import ctypes; ctypes.CDLL('libnvinfer.so.11')"
    install(tmp_path, "tensorrt-cu13", "11.4.0", {"tensorrt/__init__.py": crash})
    run = run_doctor(tmp_path, "--json")
    assert run.returncode == 1, run.stderr
    told = json.loads(run.stdout)
    assert told["healthy"] is False
    whats = {fault["package"]: fault["what"] for fault in told["faults"]}
    assert set(whats) == {"onnxruntime-gpu", "tensorrt"}
    assert "libnvinfer.so.11: cannot open shared object file" in whats["tensorrt"]
    states = {package["name"]: package for package in told["packages"]}
    assert states["tensorrt"]["state"] == "broken"
    assert states["torch"]["state"] == "ok"
    assert states["torch"]["version"] == importlib.metadata.version("torch")
    assert {verdict["command"] for verdict in told["commands"]} == set(main.commands)
    judged = {(v["command"], v["does"]): v for v in told["commands"]}
    assert not judged["embed", "an .onnx file"]["works"]
    assert "pip uninstall -y onnxruntime" in judged["embed", "an .onnx file"]["mend"]
