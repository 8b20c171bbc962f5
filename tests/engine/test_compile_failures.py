"""What TensorRT's errors mean, in one sentence that says what to do."""

import re

import pytest

from msn_export.engine import compile
from msn_export.engine.compile import explain, explain_or_quote

# what TensorRT says: what of its meaning the user must read
KNOWN = [
    ("(s8_3): Attention operation was not supported by a dedicated kernel.",
     "build an fp16 graph, or --allow-unfused takes it apart"),
    ("Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: "
     "fp8_e4m3", "sm86 cannot compute in fp8_e4m3 (fp8 takes --compute-capability 8.9 or later"),
    ("FP32 GEMM is not supported on this target", "7.5 has no fp32 matrix products"),
    ("Assertion failed: Non-zero zero point is not supported. Input zero point: 3",
     "quantise symmetrically, as msn-export calibrate does"),
    ("Network has dynamic or shape inputs, but no optimization profile has been defined",
     "the graph has a dynamic input that no profile covers; give a --batch"),
    ("Input tensor x has static dimensions that don't match kMIN dimensions in profile index 0",
     "lies outside the graph's fixed shape; export the graph with a dynamic batch"),
    ("input x has static dimensions that don't match kOPT dimensions", "a --batch lies outside"),
    ("Version tag does not match. Note: Current Version: 239", "built by another version of"),
    ("The serialized engine was created by a different version", "build it again here"),
    ("In node 3 (importFallbackPluginImporter): Plugin not found", "com.microsoft operators"),
    ("No importer registered for op: EfficientNMS", "TensorRT has no importer for this operator"),
    ("Unsupported ONNX operator", "TensorRT has no importer for this operator"),
    ("Failed to import initializer: Failed to import initializer: patch.weight",
     "the weight 'patch.weight' cannot be read; is the graph's external data file beside it?"),
    ("Failed to parse the ONNX model", "it is not an ONNX file, or a truncated one"),
    ("ModelImporter ParseFromCodedStream failed", "it is not an ONNX file, or a truncated one"),
    ("Network must have at least one output", "it holds no graph with an output"),
    ("Inputs to ElementWise must have same input types. But they are of types Half and Float",
     "it mixes Half and Float operands without a Cast"),
    ("Could not find any implementation within workspace limit", "no kernel fits into --workspace"),
    ("Insufficient workspace", "no kernel fits into --workspace; raise it or leave it out"),
    ("Unable to load library: libnvinfer_lean.so.1: cannot",
     "a library that this build needs is missing: libnvinfer_lean.so.1"),
    ("Requested amount of GPU memory could not be allocated. OutOfMemory", "enough memory"),
    ("std::bad_alloc", "there is not enough memory; lower --batch or --workspace"),
    ("CUDA out of memory", "there is not enough memory"),
    ("Unsupported SM: 0x900", "this TensorRT does not support the GPU it was to compile for"),
    ("Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient",
     "it needs an NVIDIA driver, and there is none here"),
    ("no CUDA-capable device is detected", "TensorRT-RTX compiles without one"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "meaning"), KNOWN)
def test_a_known_error_is_translated_into_one_line(raw, meaning) -> None:
    said = explain(raw)
    assert said is not None
    assert meaning in said
    assert "\n" not in said
    assert "{" not in said  # every place was filled


def test_every_meaning_is_tested() -> None:
    said = [raw for raw, _ in KNOWN]
    for pattern in compile._MEANINGS:
        assert any(re.search(pattern, raw) for raw in said), pattern


DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient))"
)


def test_a_missing_driver_is_the_reason_only_where_nothing_else_is_said() -> None:
    # TensorRT-RTX appends the missing driver to other errors where there is no GPU
    both = ["Attention operation was not supported by a dedicated kernel", DRIVER]
    assert "no fused kernel" in explain_or_quote(both)
    assert "no fused kernel" in explain_or_quote(both[::-1])
    unknown = (
        "ITensor::getDimensions: Error Code 4: API Usage Error (/Transpose: first input has type "
        "UInt8 but must have type Float. In checkType at /_src/optimizer/common/nodeBase.cpp:456)"
    )
    for raw in ([unknown, DRIVER], [DRIVER, unknown], [f"In node 0:\n{unknown}\n{DRIVER}"]):
        assert explain_or_quote(raw) == (
            "TensorRT says: ITensor::getDimensions: Error Code 4: API Usage Error (/Transpose: "
            "first input has type UInt8 but must have type Float"
        )
    assert explain_or_quote([DRIVER]).startswith("it needs an NVIDIA driver, and there is none")


@pytest.mark.parametrize(("raw", "meaning"), KNOWN)
def test_what_tensorrt_said_is_in_the_line_beside_what_it_means(raw, meaning) -> None:
    said = explain_or_quote([raw])
    assert meaning in said
    assert f"(TensorRT says: {raw[:40].rstrip(' .')}" in said


def test_an_unknown_error_is_quoted_and_silence_is_told() -> None:
    assert explain("a\nb") is None
    assert explain_or_quote(["something\t new", "else"]) == "TensorRT says: something new"
    assert explain_or_quote(["x" * 5000]) == f"TensorRT says: {'x' * 300}"
    assert explain_or_quote([]) == "TensorRT gave no reason; --log FILE keeps all it said"
