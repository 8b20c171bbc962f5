"""Contenders are found and named; one that cannot take part says why."""

from dataclasses import replace
from pathlib import Path

import pytest

from msn_export.benchmark.contenders import (
    ContenderSpec,
    Placement,
    artifact,
    artifacts,
    origin_of,
    source_graphs,
    torch_dtype,
    torch_entry,
)
from msn_export.errors import BenchError, EngineFileError
from msn_export.manifest import CheckpointRecord
from msn_export.models.checkpoint import Choices
from msn_export.spec import Dtype, ImageSize
from tests.builders.manifests import example
from tests.builders.tiny_artifacts import classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("bench"), "--batch", "1:4:8")


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("fp16", 0, "fp16"), ("bf16", 0, "bf16"), ("int8", 0, "fp16"), ("fp8", 1, "fp16"),
     (None, 0, "fp32"), ("int8", None, "fp32")],
)  # fmt: skip
def test_pytorch_computes_as_the_artifact_does_where_it_can(dtype, device, expected) -> None:
    assert (
        torch_dtype(ContenderSpec("m", "engine", {}, dtype=dtype), Placement(2, device)) == expected
    )


def test_files_of_one_name_are_called_by_their_paths(model, tmp_path) -> None:
    other = tmp_path / "tiny.onnx"
    other.write_bytes(model.read_bytes())
    assert [entry.name for entry in artifacts([model, other], Placement(1))] == [
        str(model),
        str(other),
    ]


def test_the_graph_of_an_engine_must_lie_beside_it(model, tmp_path) -> None:
    engine = tmp_path / "tiny.engine"
    engine.write_bytes(b"an engine")
    with pytest.raises(BenchError, match="has no manifest that names its graph"):
        list(source_graphs([artifact(engine, Placement(1, 0), "tiny.engine")], Placement(1, 0)))
    with pytest.raises(BenchError, match="runs in it already"):
        list(source_graphs([artifact(model, Placement(1), "tiny.onnx")], Placement(1)))
    with pytest.raises(EngineFileError, match="does not exist"):
        artifact(tmp_path / "none.engine", Placement(1), "none.engine")


def test_a_graph_in_openvino_is_entered_in_onnxruntime_too(model) -> None:
    placement = Placement(1, providers=("openvino",), precision="bf16")
    (entry,) = source_graphs([artifact(model, placement, "tiny.onnx")], placement)
    assert (entry.name, entry.file) == ("tiny.onnx (ort)", model)
    (own,) = artifacts([model], placement)
    assert own.name == "tiny.onnx (ov bf16)"
    assert [one.name for one in source_graphs([own], placement)] == ["tiny.onnx (ort)"]
    assert artifacts([model], replace(placement, precision="fp32"))[0].name == "tiny.onnx (ov)"
    assert artifacts([model], Placement(1))[0].name == "tiny.onnx"
    there = entry.opening["placement"]
    assert (there["providers"], there["precision"]) == (["cpu"], None)


def test_the_checkpoint_is_read_as_the_manifest_says_unless_another_choice_is_made() -> None:
    record = CheckpointRecord("w.pth", "ab" * 32, variant="vit-msn-small", weights="model_ema")
    entry = ContenderSpec("m.onnx", "onnx", {}, manifest=example(checkpoint=record))
    size = ImageSize(32, 32)
    found = origin_of([entry], None, ("logits",), size)
    assert (found.checkpoint, found.sha256) == ("w.pth", "ab" * 32)
    assert found.choices == Choices("vit-msn-small", "model_ema")
    other = Choices(weights="model")
    assert origin_of([entry], "other.pth", ("logits",), size, other).choices == other
    choices = torch_entry("sdpa", found, Placement(1), Dtype.FP32).opening["origin"]["choices"]
    assert (choices["variant"], choices["weights"]) == ("vit-msn-small", "model_ema")
    with pytest.raises(BenchError, match="no manifest names a checkpoint; name it with --check"):
        origin_of([ContenderSpec("m.onnx", "onnx", {})], None, ("logits",), size)
