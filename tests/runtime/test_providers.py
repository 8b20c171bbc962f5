"""Which of onnxruntime's providers are opened, and what is said where one cannot be had."""

import sys
import types
from pathlib import Path

import onnxruntime
import pytest

from msn_export.errors import RunnerError
from msn_export.graph import io
from msn_export.host import NoDriver
from msn_export.runtime import providers
from msn_export.runtime.providers import (
    CPU,
    CUDA,
    available_providers,
    choose,
    load_gpu,
    nodes_on_cpu,
    require_obtained,
    require_on_gpu,
)
from tests.builders.graphs import parse
from tests.builders.trt_bench import one_device

CARD, NO_CARD = one_device(), NoDriver("no NVIDIA driver (libcuda.so.1 cannot be loaded)")
BOTH = ("TensorrtExecutionProvider", CUDA, CPU)


@pytest.mark.parametrize(
    ("asked", "device", "available", "driver", "expected"),
    [
        (None, None, BOTH, NO_CARD, [CPU]),
        (None, None, BOTH, CARD, [CUDA]),
        (None, None, (CPU,), CARD, [CPU]),
        (None, 0, BOTH, CARD, [CUDA]),
        (["cpu"], None, BOTH, CARD, [CPU]),
        (["cuda", "cpu"], 0, BOTH, CARD, [CUDA, CPU]),
        (["tensorrt", "cuda"], None, BOTH, CARD, ["TensorrtExecutionProvider", CUDA]),
        ([CUDA], None, BOTH, CARD, [CUDA]),
    ],
)
def test_which_providers_are_opened(asked, device, available, driver, expected) -> None:
    chosen = choose(asked, device, available, driver)
    assert [name for name, _ in chosen] == expected
    for name, options in chosen:
        tf32 = {"use_tf32": "0"} if name == CUDA else {}  # fp32 is computed as such
        assert options == ({} if name == CPU else {"device_id": 0, **tf32})


@pytest.mark.parametrize(
    ("asked", "device", "available", "driver", "message"),
    [
        (["cuda"], None, BOTH, NO_CARD, "CUDAExecutionProvider was asked for, and here: no NVID"),
        (["cuda"], None, (CPU,), CARD, "has cpu; pip install onnxruntime-gpu instead of onnxru"),
        (["openvino"], None, BOTH, CARD, "has no provider 'openvino'; it has tensorrt, cuda, cpu"),
        (
            ["openvno"],
            None,
            BOTH,
            NO_CARD,
            r"no provider 'openvno'; it has cpu, and openvino is a "
            r"runtime of its own; did you mean openvino\?",
        ),
        (["cdua"], None, BOTH, CARD, r"it has tensorrt, cuda, cpu, and .*; did you mean cuda\?"),
        (["rocm"], None, BOTH, NO_CARD, "it has cpu, and openvino is a runtime of its own$"),
        ([], None, BOTH, CARD, "no provider is asked for; give one of cpu, cuda"),
        (["cpu"], 0, BOTH, CARD, r"device 0 is a GPU and the providers asked for \(cpu\) use none"),
        (["cuda"], 3, BOTH, CARD, "device 3 does not exist; here are 0: Stand-in GPU"),
        (None, 0, BOTH, NO_CARD, "CUDAExecutionProvider was asked for, and here: no NVIDIA dr"),
    ],
)
def test_a_provider_that_cannot_be_had_is_an_error(
    asked, device, available, driver, message
) -> None:
    with pytest.raises(RunnerError, match=message):
        choose(asked, device, available, driver)


def test_obtained_means_every_one() -> None:
    require_obtained([CUDA], [CUDA, CPU], "m.onnx")
    with pytest.raises(RunnerError, match="TensorrtExecutionProvider was asked for"):
        require_obtained(["TensorrtExecutionProvider", CUDA], [CUDA, CPU], "m.onnx")


def test_a_name_alone_is_no_list() -> None:
    with pytest.raises(RunnerError, match=r"^providers is 'cpu'; give a list, as \['cpu'\]$"):
        choose("cpu", None, ["CPUExecutionProvider"], NoDriver("none"))


# where it runs


@pytest.mark.parametrize(
    ("version", "on_cpu", "told"),
    [
        ("1.24.4", {"Attention": 12, "Pad": 1}, "12 Attention, 1 Pad on the CPU, .*; install onnx"
         "runtime-gpu 1.25 or later, or allow it"),
        ("1.25.0", {"QuantizeLinear": 3, "Shape": 2}, "run 3 QuantizeLinear on the CPU, .*; install"
         " onnxruntime-gpu 1.26 or later, or allow it"),
        ("1.31.1", {"Attention": 1}, "run 1 Attention on the CPU, .* has no kernel; allow it"),
    ],
)  # fmt: skip
def test_what_would_run_on_the_cpu_is_an_error_that_names_it(
    monkeypatch, version, on_cpu, told
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(RunnerError, match=rf"^m\.onnx: onnxruntime {version} would .*{told}"):
        require_on_gpu(on_cpu, [CUDA], "m.onnx")
    require_on_gpu(on_cpu, [CUDA, CPU], "m.onnx")  # it was asked for


def test_shapes_are_computed_where_onnxruntime_likes() -> None:
    require_on_gpu({"Shape": 3, "Gather": 3, "Concat": 1, "Reshape": 1}, [CUDA], "m.onnx")


def test_the_nodes_of_a_real_session_are_counted(tmp_path) -> None:
    text = "g (float[b,4] x) => (float[b,4] y) { d = Relu (x)   e = Tanh (d)   y = Relu (e) }"
    io.save(parse(text), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=[CPU])
    assert nodes_on_cpu(session) == {"Relu": 2, "Tanh": 1}


# the CUDA provider as a plugin


@pytest.fixture
def plugin(monkeypatch, tmp_path) -> Path:
    """Install a package of the plugin's shape, beside an onnxruntime without CUDA."""
    (tmp_path / "onnxruntime_ep_cuda.py").write_text(
        "def get_ep_name(): return 'CUDAExecutionProvider'\n"
        "def get_library_path(): return '/site/libonnxruntime_providers_cuda.so'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_cuda", raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    return tmp_path / "onnxruntime_ep_cuda.py"


def test_a_plugin_is_registered_once_before_its_session(plugin, monkeypatch) -> None:
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *told: registered.append(told)
    )
    monkeypatch.setattr(
        onnxruntime,
        "get_ep_devices",
        lambda: [types.SimpleNamespace(ep_name=name) for name, _ in registered],
    )
    assert available_providers() == [CUDA, CPU]
    assert choose(None, None, available_providers(), CARD)[0][0] == CUDA
    load_gpu([CPU])
    assert registered == []
    load_gpu([CUDA])
    load_gpu([CUDA])
    assert registered == [(CUDA, "/site/libonnxruntime_providers_cuda.so")]


def test_a_plugin_that_onnxruntime_cannot_load_is_told(plugin) -> None:
    """Real: there is no library at that path."""
    with pytest.raises(
        RunnerError,
        match=r"^onnxruntime_ep_cuda is installed, and onnxruntime \S+ cannot load it: .*libonnxrun"
        r"time_providers_cuda\.so.*; install the CUDA libraries it needs and an onnxruntime of its",
    ):
        load_gpu([CUDA])


def test_an_early_plugin_of_another_name_is_told(plugin) -> None:
    plugin.write_text("def get_ep_name(): return 'CudaPluginExecutionProvider'\n")
    with pytest.raises(
        RunnerError,
        match=r"names its provider 'CudaPluginExecutionProvider', as early ones did; expected 'CUD",
    ):
        load_gpu([CUDA])


def test_where_cuda_is_built_in_no_plugin_is_looked_for(plugin, monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(BOTH))
    monkeypatch.setattr(providers, "_load_plugin", lambda: pytest.fail("it was"))
    assert available_providers() == list(BOTH)
    load_gpu([CUDA])
