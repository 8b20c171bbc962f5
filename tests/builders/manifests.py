"""A manifest with every field filled, as an engine of a labelled checkpoint has it."""

from typing import Any

from msn_export.fit_record import FitRecord, HeldOutAccuracy
from msn_export.manifest import (
    AccuracyRecord,
    AttentionRecord,
    CheckpointRecord,
    CheckRecord,
    EngineRecord,
    Manifest,
    ShareRecord,
    SourceRecord,
)
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, Dtype, ImageSize, Scores, TensorSpec


def example(**changes: Any) -> Manifest:
    """Make one; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "kind": "engine",
        "output": "m.engine",
        "sha256": "ab" * 32,
        "bytes": 12_345_678,
        "dtype": Dtype.FP16,
        "inputs": (TensorSpec("pixel_values", "float", ("batch", 3, 32, 32)),),
        "outputs": (TensorSpec("logits", "float", ("batch", 3)),),
        "profiles": (BatchRange(1, 1, 1), BatchRange(2, 4, 8)),
        "preprocessing": preset("msn-eval", ImageSize(32, 32)),
        "nodes": 61,
        "ops": {"MatMul": 8, "Attention": 2},
        "attention": AttentionRecord(2, 2, "kernel"),
        "check": check(),
        "opset": 23,
        "target": "tensorrt_rtx",
        "labels": ("cat", "dög", "[bird]"),
        "scores": Scores.SOFTMAX,
        "checkpoint": CheckpointRecord("facebook/tiny@0123", "cd" * 32, ("weights were float16",)),
        "config": {"dim": 64},
        "islands": {"blocks.0.Add": 99999.5, "norm.bias": None},
        "simplified": "kept: 3 nodes fewer",
        "source": SourceRecord("m.onnx", "ef" * 32),
        "engine": engine(),
        "notes": ("skipped: a.png",),
        "command": "msn-export trt m.onnx",
        "versions": {"msn-export": "0.1.0"},
        "seconds": 1.5,
        "peak_rss_bytes": 2_000_000_000,
    }
    return Manifest(**{**fields, **changes})


def check(**changes: Any) -> CheckRecord:
    fields: dict[str, Any] = {
        "images": 16,
        "source": "photographs",
        "batches": (1, 4, 8),
        "max_abs": 1.25e-3,
        "mean_abs": 2e-4,
        "cosine_min": 0.99991,
        "cosine_p1": 0.99992,
        "cosine_median": 0.99999,
        "passed": True,
        "executed_on": "onnxruntime 1.31",
        "reference": "m.onnx in onnxruntime 1.31",
        "outputs": {"logits": {"max_abs": 1.25e-3, "nan": 0.0}},
    }
    return CheckRecord(**{**fields, **changes})


def counted(**changes: Any) -> AccuracyRecord:
    """Make a comparison of accuracy; of 4 images of the reference's 580, 1 of others."""
    fields: dict[str, Any] = {
        "images": 599,
        "reference": ShareRecord(580 / 599, (0.951, 0.980)),
        "candidate": ShareRecord(577 / 599, (0.945, 0.976)),
        "difference": -3 / 599,
        "lost": 4,
        "gained": 1,
        "p_value": 0.1875,
        "loss_bound": 0.0117,
        "allowed": 0.0,
        "not_finite": 0,
        "conclusion": "no significant loss",
        "passed": True,
        "labelled": "digits",
        "classes": 10,
        "by": "logits",
        "given": 1797,
    }
    return AccuracyRecord(**{**fields, **changes})


def fit(**changes: Any) -> FitRecord:
    """Make a record of ten digits, five pictures each."""
    fields: dict[str, Any] = {
        "features": "msn",
        "blocks": 1,
        "C": 400.0,
        "strengths": {},
        "images": 50,
        "classes": 3,
        "shots": 5,
        "seed": 0,
        "labelled": "digits",
        "labelled_sha256": "12" * 32,
        "test": None,
        "test_sha256": None,
        "broken": 1,
        "errors": ("digits/a.png is not a readable picture",),
        "turned": 0,
        "skipped": {"no picture": 2},
        "gradient": 1e-6,
        "steps": 100,
        "weights": "34" * 32,
        "compared": 50,
        "relative": 3e-7,
        "same": 1.0,
        "accuracy": HeldOutAccuracy(
            "the images not drawn",
            30,
            0.9,
            None,
            (0.744, 0.965),
            {"cat": 1.0, "dög": None, "[bird]": 0.7},
            ((10, 0, 0), (0, 0, 0), (3, 0, 17)),
            (0.9, 0.8),
            0.85,
            0.0707,
        ),
    }
    return FitRecord(**{**fields, **changes})


def engine(**changes: Any) -> EngineRecord:
    fields: dict[str, Any] = {
        "backend": "tensorrt_rtx",
        "version": "1.7.1",
        "compute_capabilities": ("8.9", "12.0"),
        "precision": "fp16",
        "kernels": 22,
        "kernels_per_block": {"0": 9, "1": 8},
        "fused_attention": 2,
        "gemm_dtypes": {"Half": 8},
        "accumulators": {"fp16": 1, "fp32": 1},
        "executed": False,
        "reason": "compiled, not executed: no NVIDIA driver",
        "census": [{"kernels": 22}],
        "options": {"workspace": 1 << 30},
    }
    return EngineRecord(**{**fields, **changes})
