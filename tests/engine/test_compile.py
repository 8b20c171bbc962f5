"""A builder is set up as its release wants it; those that need a GPU are seen through stand-ins."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from msn_export.engine.compile import BuilderLog, compile_engine
from msn_export.engine.options import BuildSpec
from msn_export.errors import BuildError
from msn_export.runtime.versions import row_for
from msn_export.spec import BatchRange, Dtype


def stand_in(dtypes: tuple[str, ...] = ("HALF",)) -> MagicMock:
    """A TensorRT module whose network has one dynamic input and one tensor of each dtype."""
    trt = MagicMock()
    network = trt.Builder.return_value.create_network.return_value
    network.num_inputs, network.num_layers = 1, len(dtypes)
    network.get_input.return_value = SimpleNamespace(name="x", shape=(-1, 3, 32, 32))
    network.get_layer.side_effect = [
        MagicMock(num_outputs=1, get_output=lambda _i, d=dtype: MagicMock(dtype=named(d)))
        for dtype in dtypes
    ]
    builder = trt.Builder.return_value
    builder.build_serialized_network.return_value = b"plan"
    builder.create_builder_config.return_value.add_optimization_profile.return_value = 0
    inspector = trt.Runtime.return_value.deserialize_cuda_engine.return_value
    inspector.create_engine_inspector.return_value.get_engine_information.return_value = (
        '{"Layers": [{"Name": "_gemm_mha_v2", "LayerType": "kgen"}]}'
    )
    return trt


def named(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name)


def compile_with(trt: MagicMock, version: str, **options: object) -> tuple[object, MagicMock]:
    row = row_for("tensorrt", version)
    assert row is not None
    spec = BuildSpec(Path("x.onnx"), (BatchRange(),), **options)
    done = compile_engine(trt, row, spec, MagicMock(), BuilderLog(), None)
    return done, trt.Builder.return_value.create_builder_config.return_value


def test_8_6_is_told_its_batch_and_its_precisions() -> None:
    trt = stand_in(("HALF", "INT8"))
    del trt.IProgressMonitor, trt.ComputeCapability, trt.IAttentionInputLayer, trt.LayerType
    trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH = 0
    done, config = compile_with(trt, "8.6.1")
    trt.Builder.return_value.create_network.assert_called_once_with(1)
    assert [call.args[0] for call in config.set_flag.call_args_list] == [
        trt.BuilderFlag.FP16,
        trt.BuilderFlag.INT8,
    ]
    assert [kernel.name for kernel in done.kernels] == ["_gemm_mha_v2"]


def test_8_6_takes_fp16_for_a_graph_in_fp32_and_has_no_bf16() -> None:
    trt = stand_in(("FLOAT",))
    del trt.IProgressMonitor
    _, config = compile_with(trt, "8.6.1", precision=Dtype.FP16)
    config.set_flag.assert_called_once_with(trt.BuilderFlag.FP16)
    with pytest.raises(BuildError, match="this TensorRT has no bf16; use --fp16"):
        compile_with(stand_in(("FLOAT",)), "8.6.1", precision=Dtype.BF16)


def test_11_is_strongly_typed_and_takes_its_options() -> None:
    trt = stand_in()
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    trt.IProgressMonitor = type("IProgressMonitor", (), {})
    options = {"workspace": 1 << 30, "optimization_level": 4, "version_compatible": True}
    options["hardware_compatible"] = True
    _, config = compile_with(trt, "11.4.0", **options)
    trt.Builder.return_value.create_network.assert_called_once_with(2)
    config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    assert config.builder_optimization_level == 4
    config.set_flag.assert_called_once_with(trt.BuilderFlag.VERSION_COMPATIBLE)
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.hardware_compatibility_level is level
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)
    config.set_compute_capability.assert_not_called()
    profile = trt.Builder.return_value.create_optimization_profile.return_value
    profile.set_shape.assert_called_once_with("x", (1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))


def test_tf32_is_used_where_it_is_asked_for_alone() -> None:
    for version, tf32 in (("11.4.0", False), ("11.4.0", True), ("8.6.1", False), ("8.6.1", True)):
        trt = stand_in(("FLOAT",))
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
        trt.IProgressMonitor = type("IProgressMonitor", (), {})
        _, config = compile_with(trt, version, tf32=tf32)
        cleared = [call.args for call in config.clear_flag.call_args_list]
        assert cleared == ([] if tf32 else [(trt.BuilderFlag.TF32,)])
