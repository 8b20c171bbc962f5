"""The network of the runner's tests is what it says, so that on a GPU the same numbers come out."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from msn_export.engine.build import build_engine
from msn_export.engine.options import BuildSpec, find_backend
from msn_export.runtime.dlpack import OF_ONNX
from msn_export.spec import BatchRange
from tests.builders.networks import Network, compute

NETWORKS = {
    "plain": Network(),
    "two profiles": Network(profiles=((1, 1, 1), (4, 8, 16))),
    "fixed": Network(profiles=((4, 4, 4),), is_static=True),
    "bytes in, halves out": Network(dtype="uint8", outputs=(("embedding", "float16", 8),)),
    "bfloat16": Network(outputs=(("embedding", "bfloat16", 8),)),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_onnxruntime_computes_the_same(network, tmp_path: Path) -> None:
    if any(kind == "bfloat16" for _, kind, _ in network.outputs):
        pytest.skip("NumPy cannot name what onnxruntime would give")
    session = onnxruntime.InferenceSession(
        network.graph(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    images = network.images(network.profiles[0][1])
    outputs = session.run(list(compute(network, images)), {network.input: images})
    for found, wanted in zip(outputs, compute(network, images).values(), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_value_is_exact_in_bfloat16(network) -> None:
    exact = Network(outputs=tuple((name, "float", width) for name, _, width in network.outputs))
    for values in compute(exact, exact.images(8)).values():
        assert (values.view(np.uint32) & 0xFFFF == 0).all()
    assert OF_ONNX[network.dtype].bits in {8, 32}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_tensorrt_rtx_compiles_it(network, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    profiles = tuple(BatchRange(*profile) for profile in network.profiles)
    spec = BuildSpec(network.graph(tmp_path / "m.onnx"), profiles)
    result = build_engine(spec, find_backend("tensorrt-rtx"), tmp_path / "m.engine")
    assert result.bytes > 0
