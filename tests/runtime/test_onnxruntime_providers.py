"""Which of onnxruntime's providers are opened, and what is said where one cannot be had."""

import pytest

from msn_export.errors import RunnerError
from msn_export.host import NoDriver
from msn_export.runtime.onnxruntime import CPU, CUDA, choose, require_obtained
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
