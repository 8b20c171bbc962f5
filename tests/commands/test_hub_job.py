"""Options of ``hub`` that contradict each other are refused before anything is loaded."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.commands.hub_job import FILES, HubJob, is_repository
from msn_export.errors import OutputError, SpecError
from msn_export.spec import Dtype

RANDOM = "random:vit-msn-small:0"


def job(**options: object) -> HubJob:
    return HubJob(**{"checkpoint": RANDOM, "output": Path("out"), **options})


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, [Dtype.FP32, Dtype.FP16]),
        ({"images": Path()}, [Dtype.FP32, Dtype.FP16, Dtype.INT8]),
        ({"images": Path(), "dtypes": (Dtype.FP16,)}, [Dtype.FP16]),
    ],
)
def test_int8_is_written_where_there_are_pictures_to_take_ranges_on(options, written) -> None:
    assert list(job(**options).written) == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "uint8"], "--input uint8: transformers.js and optimum feed normalised floats; "
         "leave it out, or export a graph for your own runtime with msn-export onnx"),
        (["--dtype", "int8"], "--dtype int8 takes ranges on pictures like those to come; give "
         "--images too, or leave int8 out"),
        (["--push", "model"], "--push 'model' is no repository id; expected OWNER/NAME"),
        (["--push", "me/../a"], "--push 'me/../a' is no repository id; expected OWNER/NAME"),
        (["--private"], "--private is for a repository; give --push REPO_ID too"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(options, message) -> None:
    result = CliRunner().invoke(main, ["hub", RANDOM, "-o", "out", *options])
    assert result.exit_code == 1
    assert result.stderr.strip() == f"error: {message}"


def test_an_unknown_dtype_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["hub", RANDOM, "-o", "out", "--dtype", "fp32,bf16"])
    assert result.exit_code == 2
    assert "'bf16' is none of fp32, fp16, int8" in result.stderr
    with pytest.raises(SpecError, match=r"HubJob\.dtypes has bf16; expected fp32, fp16, int8"):
        job(dtypes=(Dtype.BF16,))


def test_a_graph_says_its_labels_and_preprocessing_itself(tmp_path) -> None:
    with pytest.raises(SpecError, match=r"m\.onnx says its weights, labels and preprocessing it"):
        job(checkpoint="m.onnx", preprocess="hf")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("me/model", True), ("a.b-c/D_e.1", True), ("model", False), ("me/a/b", False),
        ("me/a--b", False), ("me/a..b", False), ("me/-a", False), ("me/a.", False), ("/a", False),
    ],
)  # fmt: skip
def test_a_repository_is_named_as_the_hub_names_it(name, valid) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert is_repository(name) is valid
    if valid:
        validate_repo_id(name)
    elif "/" in name:
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_a_place_that_cannot_be_written_is_refused(tmp_path) -> None:
    def message(output: Path, **options: object) -> str:
        with pytest.raises(OutputError) as raised:
            job(output=output, **options).validate_paths()
        return str(raised.value)

    assert "does not exist; create it or choose another -o" in message(tmp_path / "none/out")
    (tmp_path / "file").touch()
    assert "is no folder; choose another with -o" in message(tmp_path / "file", force=True)
    (tmp_path / "source/onnx").mkdir(parents=True)
    (tmp_path / "source/onnx/m.onnx").touch()
    reads = str(tmp_path / "source/onnx/m.onnx")
    found = message(tmp_path / "source", checkpoint=reads, force=True)
    assert found.endswith("is, or holds, what is read; choose another with -o")


def test_the_files_of_a_folder_are_known() -> None:
    assert "onnx/model_quantized.onnx.json" in FILES
    assert len(FILES) == 9
