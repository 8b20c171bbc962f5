"""Small artifacts for Triton's tests: graphs that run, and plans that are no engines.

``plan`` writes a manifest of full TensorRT beside bytes that only begin as an engine does: no full
TensorRT can be had here. What is tested with them is configuration, never an engine.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from msn_export.manifest import (
    AttentionRecord,
    EngineRecord,
    Manifest,
    manifest_path,
    seal,
    sha256_of,
)
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, Dtype, ImageSize, TensorSpec

SIZE = 8
LABELS = ("cat", "dog", "a bird")

# a classifier: the mean of each plane through a matrix, so each answer depends on each pixel
GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
g ({input}) => (float[{batch},3] logits, float[{batch},3] embedding)
<float[3,3] w = {{0.5, -1.0, 0.25, 2.0, 0.125, -0.5, 1.0, 1.5, -2.0}}>
{{
  {cast}
  p = GlobalAveragePool (x)
  embedding = Flatten <axis = 1> (p)
  logits = MatMul (embedding, w)
}}
"""
CASTS = {
    "float": ("float[{batch},3,8,8] pixel_values", "x = Identity (pixel_values)"),
    "uint8": (
        "uint8[{batch},8,8,3] images",
        "f = Cast <to = 1> (images)  x = Transpose <perm = [0, 3, 1, 2]> (f)",
    ),
}


def graph(
    path: Path,
    *,
    batch: int | str = "batch",
    input_format: str = "float",
    labels: tuple[str, ...] = LABELS,
    profile: BatchRange | None = None,
    manifest: bool = True,
    opset: int = 17,
    dtype: Dtype = Dtype.FP32,
    scale: float = 1.0,
) -> Path:
    """Write an ONNX classifier of 8x8 images and its manifest, which says that it is ``dtype``."""
    source, cast = CASTS[input_format]
    text = GRAPH.format(input=source.format(batch=batch), batch=batch, cast=cast)
    model = onnx.parser.parse_model(text.replace('"" : 17', f'"" : {opset}'))
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]) * np.float32(scale)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    fixed = BatchRange(batch, batch, batch) if isinstance(batch, int) else BatchRange(1, 4, 16)
    if manifest:
        named = {"opset": opset, "dtype": dtype}
        describe(path, "onnx", input_format, batch, (profile or fixed,), labels, **named)
    return path


def plan(
    path: Path,
    *,
    version: str = "10.13.3.9",
    capability: str = "8.9",
    later: bool = False,
    profiles: tuple[BatchRange, ...] = (BatchRange(1, 4, 16),),
    backend: str = "tensorrt",
    labels: tuple[str, ...] = LABELS,
    options: dict[str, Any] | None = None,
    batch: int | str = "batch",
) -> Path:
    """Write bytes that begin as a full TensorRT engine does, with the manifest of one."""
    numbers = [*map(int, version.split(".")), 0][:4]
    path.write_bytes(b"ftrt" + bytes(20) + struct.pack("4B", *numbers) + capability.encode() * 40)
    record = EngineRecord(
        backend=backend,
        version=version,
        compute_capabilities=(capability,),
        precision="fp16",
        kernels=1,
        kernels_per_block={},
        fused_attention=0,
        gemm_dtypes={},
        executed=False,
        reason="no engine: bytes of a test",
        later=later,
        options=options or {},
    )
    describe(path, "engine", "float", batch, profiles, labels, engine=record)
    return path


def describe(
    path: Path,
    kind: Any,
    input_format: str,
    batch: int | str,
    profiles: tuple[BatchRange, ...],
    labels: tuple[str, ...],
    *,
    engine: EngineRecord | None = None,
    opset: int = 17,
    dtype: Dtype = Dtype.FP32,
) -> None:
    """Write the sealed manifest of a file."""
    on_cpu = "onnxruntime" if opset > 17 else "portable"
    shape = (batch, 3, SIZE, SIZE) if input_format == "float" else (batch, SIZE, SIZE, 3)
    name = "pixel_values" if input_format == "float" else "images"
    manifest = Manifest(
        kind=kind,
        output=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        dtype=dtype,
        inputs=(TensorSpec(name, input_format, shape),),
        outputs=(
            TensorSpec("logits", "float", (batch, 3)),
            TensorSpec("embedding", "float", (batch, 3)),
        ),
        profiles=profiles,
        preprocessing=preset("hf", ImageSize(SIZE, SIZE)),
        nodes=4,
        ops={},
        attention=AttentionRecord(0, 0, "none"),
        check=None,
        opset=opset,
        target=engine.backend if engine else on_cpu,
        labels=labels,
        engine=engine,
    )
    manifest_path(path).write_text(seal(manifest), encoding="utf-8")
