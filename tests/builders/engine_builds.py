"""Tiny engines, each compiled once a test run by TensorRT-RTX, for SM 8.9 unless told otherwise."""

import importlib.util
import tempfile
from functools import cache
from pathlib import Path

import pytest

from msn_export.engine.build import BuildResult, build_engine
from msn_export.engine.options import Backend, BuildSpec, find_backend
from msn_export.spec import BatchRange, ComputeCapability
from tests.builders.engine_graphs import Vit, save

# found, not imported: these tests are collected with those that run another TensorRT on a GPU
NEEDS_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
FOLDER = tempfile.TemporaryDirectory(prefix="msn-export-engines-")


@cache
def rtx() -> Backend:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    return find_backend("tensorrt-rtx")


@cache
def graph(vit: Vit) -> Path:
    return save(vit, Path(FOLDER.name) / f"{abs(hash(vit))}.onnx")


def spec_of(
    vit: Vit, capabilities: str = "8.9", profiles: str = "1:8:32", **options: object
) -> BuildSpec:
    """Both lists are separated by spaces."""
    return BuildSpec(
        graph(vit),
        tuple(BatchRange.parse(text) for text in profiles.split()),
        tuple(ComputeCapability.parse(text) for text in capabilities.split()),
        **options,
    )


@cache
def built(
    vit: Vit, capabilities: str = "8.9", profiles: str = "1:8:32", decompose: bool = False
) -> BuildResult:
    spec = spec_of(vit, capabilities, profiles, allow_unfused=decompose)
    name = abs(hash((vit, capabilities, profiles, decompose)))
    return build_engine(spec, rtx(), Path(FOLDER.name) / f"{name}.engine")
