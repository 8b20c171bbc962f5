"""The graph of a folder is chosen by where it runs, and a folder of two models is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import ViTMSNConfig

from msn_export.errors import RunnerError
from msn_export.host import Device, Driver
from msn_export.hub_folder import GRAPHS, graph_in, transformers_config
from msn_export.manifest import CheckpointRecord, manifest_path
from msn_export.models.config import VARIANTS, named_variant
from msn_export.runtime import open_runner, opening, providers
from msn_export.spec import ComputeCapability, Dtype
from tests.builders.artifacts import classifier, copy_of, rewrite

EVERY = tuple(GRAPHS)
ADA = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 24 << 30)


def folder_with(folder: Path, *dtypes: Dtype) -> Path:
    for dtype in dtypes:
        path = folder / GRAPHS[dtype]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("there", "on_cpu", "on_gpu"),
    [
        (EVERY, Dtype.INT8, Dtype.FP16),
        ((Dtype.FP32, Dtype.FP16), Dtype.FP32, Dtype.FP16),
        ((Dtype.FP32, Dtype.INT8), Dtype.INT8, Dtype.FP32),
        ((Dtype.FP16,), Dtype.FP16, Dtype.FP16),
    ],
)
def test_a_graph_is_chosen_by_where_it_runs(tmp_path, there, on_cpu, on_gpu) -> None:
    folder = folder_with(tmp_path, *there)
    assert graph_in(folder, None, on_gpu=False) == folder / GRAPHS[on_cpu]
    assert graph_in(folder, None, on_gpu=True) == folder / GRAPHS[on_gpu]
    for dtype in there:
        assert graph_in(folder, dtype, on_gpu=True) == folder / GRAPHS[dtype]


def message_of(folder: Path, dtype: Dtype | None = None) -> str:
    with pytest.raises(RunnerError) as raised:
        graph_in(folder, dtype, on_gpu=False)
    return str(raised.value)


def test_a_dtype_that_is_asked_for_and_not_there_is_refused(tmp_path) -> None:
    folder = folder_with(tmp_path, Dtype.FP32)
    assert message_of(folder, Dtype.INT8) == (
        f"{folder} has no int8 graph, onnx/model_quantized.onnx; it has fp32: write it again with "
        "that dtype"
    )
    assert message_of(folder, Dtype.BF16).endswith("a folder's graphs are fp32, fp16, int8")


@pytest.mark.parametrize("name", ["onnx/encoder.onnx", "onnx/decoder_model.onnx", "model.onnx"])
def test_a_folder_of_two_models_is_refused(tmp_path, name) -> None:
    folder = folder_with(tmp_path, *EVERY)
    (folder / "onnx/model_q4.onnx").touch()  # the same model in another dtype
    assert graph_in(folder, Dtype.FP32, on_gpu=False)
    (folder / name).touch()
    assert message_of(folder) == (
        f"{folder} holds two models, onnx/model.onnx and {name}; give the .onnx file that is meant"
    )


def test_graphs_of_other_weights_are_two_models(tmp_path) -> None:
    folder, given = folder_with(tmp_path / "folder", Dtype.FP32, Dtype.FP16), tmp_path / "given"
    given.mkdir()
    path = copy_of(classifier(), given)
    for dtype, weights in ((Dtype.FP32, "a" * 64), (Dtype.FP16, "a" * 64), (Dtype.FP16, "b" * 64)):
        rewrite(path, checkpoint=CheckpointRecord("facebook/tiny", weights))
        shutil.copy(path, folder / GRAPHS[dtype])
        shutil.copy(manifest_path(path), manifest_path(folder / GRAPHS[dtype]))
        if weights == "a" * 64:
            assert graph_in(folder, None, on_gpu=False) == folder / GRAPHS[Dtype.FP32]
    assert "holds two models, onnx/model.onnx and onnx/model_fp16.onnx" in message_of(folder)


def test_a_folder_without_a_graph_is_refused(tmp_path) -> None:
    (tmp_path / "onnx").mkdir()
    line = "has none of onnx/model.onnx, onnx/model_fp16.onnx, onnx/model_quantized.onnx; give the"
    with pytest.raises(RunnerError, match=line):
        open_runner(tmp_path)


def test_a_runner_opens_a_folder(tmp_path, monkeypatch) -> None:
    path = copy_of(classifier(), tmp_path)
    folder = folder_with(tmp_path / "folder", Dtype.FP32)
    for source, name in ((path, "model.onnx"), (manifest_path(path), "model.onnx.json")):
        shutil.move(source, folder / "onnx" / name)
    with open_runner(folder, dtype="fp32", providers=["cpu"]) as runner:
        assert runner.labels == ("class 0", "class 1", "class 2")
    with pytest.raises(RunnerError, match="dtype is 'fp8'; expected one of fp32, fp16, int8"):
        open_runner(folder, dtype="fp8")
    with pytest.raises(RunnerError, match="dtype chooses among a folder's graphs; leave it out"):
        open_runner(folder / "onnx/model.onnx", dtype="fp32")


def test_a_gpu_takes_the_fp16_graph(tmp_path, monkeypatch) -> None:
    folder = folder_with(tmp_path, *EVERY)
    monkeypatch.setattr(opening, "find_driver", lambda: Driver("13.0", (ADA,)))
    monkeypatch.setattr(providers, "available_providers", lambda: [providers.CUDA, providers.CPU])
    found = opening._graph_in(folder, None, None, None)
    assert found.name == "model_fp16.onnx"
    assert opening._graph_in(folder, None, None, ["cpu"]).name == "model_quantized.onnx"
    assert opening._graph_in(folder, "fp32", None, None).name == "model.onnx"


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_a_shape_back(variant) -> None:
    shape = named_variant(variant)
    written = transformers_config(replace(shape, labels=("cat", "dog"), problem_type=None))
    read = ViTMSNConfig.from_dict(written)
    again = read.to_dict()
    assert {name: again[name] for name in written if name not in {"id2label", "label2id"}} == {
        name: value for name, value in written.items() if name not in {"id2label", "label2id"}
    }
    assert read.id2label == {0: "cat", 1: "dog"}
    # all that transformers writes of a model is there, but for its own version and dtype
    left = set(ViTMSNConfig.from_dict(written).to_diff_dict()) - set(written)
    assert left <= {"transformers_version", "dtype", "torch_dtype"}


def test_sides_that_differ_and_a_problem_type_are_written() -> None:
    shape = replace(
        named_variant("vit-msn-small"), image_size=(224, 320), labels=("a",),
        problem_type="multi_label_classification",
    )  # fmt: skip
    written = transformers_config(shape)
    assert written["image_size"] == [224, 320]
    assert written["problem_type"] == "multi_label_classification"
    assert transformers_config(named_variant("vit-msn-small")).keys().isdisjoint({"id2label"})
