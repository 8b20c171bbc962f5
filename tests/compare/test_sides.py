"""Two artifacts are brought together the same way whatever the interpreter's hash seed."""

import subprocess
import sys
from dataclasses import replace

import pytest

from msn_export import manifest
from msn_export.commands.jobs import OnnxJob
from msn_export.commands.onnx import run_onnx
from msn_export.compare.sides import open_artifact, open_pair
from msn_export.errors import SpecError
from msn_export.models.checkpoint import Choices
from msn_export.preprocessing import assumed, preset
from msn_export.spec import ImageSize, InputFormat
from tests.builders.artifacts import alone, classifier, copy_of, engine, rewrite
from tests.builders.checkpoints import hugging_face, processor


def test_of_two_checkpoints_the_reference_says_the_image_size(tmp_path) -> None:
    for size in (32, 48):
        hugging_face(tmp_path / str(size), image_size=size)
    names = [str(tmp_path / "32"), str(tmp_path / "48")]
    assert str(open_pair(*names).reference.size) == "32x32"
    assert str(open_pair(*reversed(names)).candidate.size) == "48x48"


def test_a_checkpoint_without_a_preprocessor_config_is_hf_as_onnx_reads_it(tmp_path) -> None:
    hugging_face(tmp_path / "hf", labels=3)
    _, known = run_onnx(OnnxJob(str(tmp_path / "hf"), tmp_path / "m.onnx", check=False))
    assert known.preprocessing == assumed(ImageSize(32, 32))
    (said,) = known.preprocessing.notes
    assert known.notes[0] == said
    rewrite(tmp_path / "m.onnx", preprocessing=preset("msn-eval", ImageSize(32, 32)))
    pair = open_pair(str(tmp_path / "hf"), str(tmp_path / "m.onnx"))
    assert pair.preprocessing == known.preprocessing  # and not the candidate's own
    assert said in pair.notes
    processor(tmp_path / "hf", size=48, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pair = open_pair(str(tmp_path / "hf"), str(tmp_path / "m.onnx"))
    assert pair.preprocessing.mean == (0.5, 0.5, 0.5)
    assert said not in pair.notes


def test_a_preprocessing_that_is_chosen_is_no_assumption(tmp_path) -> None:
    hugging_face(tmp_path / "hf")
    job = OnnxJob(str(tmp_path / "hf"), tmp_path / "m.onnx", preprocess="msn-eval", check=False)
    assert not any("assumed" in note for note in run_onnx(job)[1].notes)


def test_a_graph_that_does_not_say_its_preprocessing_is_given_the_others_and_said(tmp_path) -> None:
    ours, theirs = copy_of(classifier(), tmp_path), tmp_path / "theirs.onnx"
    alone(ours, theirs, product="")
    rewrite(ours, preprocessing=preset("msn-eval", ImageSize(32, 32)))
    said = f"{theirs} does not say its preprocessing: that of {ours} assumed"
    for names in ((ours, theirs), (theirs, ours)):
        pair = open_pair(*map(str, names))
        assert pair.preprocessing.name == "msn-eval"
        assert said in pair.notes


@pytest.mark.parametrize("seed", ["1", "3"])
def test_no_order_depends_on_a_hash_seed(tmp_path, seed) -> None:
    for size in (32, 48):
        hugging_face(tmp_path / str(size), image_size=size)
    code = (
        "import sys; from msn_export.compare.sides import open_pair; "
        "print(open_pair(*sys.argv[1:]).candidate.size)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "32"), str(tmp_path / "48")],
        env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "32x32\n"


@pytest.mark.parametrize(
    ("dtype", "input_format"), [("uint8", InputFormat.UINT8), ("float32", InputFormat.FLOAT)]
)
def test_an_engine_of_a_foreign_graph_keeps_its_inputs_name(tmp_path, dtype, input_format) -> None:
    copy = copy_of(engine(), tmp_path)
    known = manifest.read(copy)
    assert known is not None
    batch, *planes = known.inputs[0].shape
    shape = (batch, *planes[1:], planes[0]) if dtype == "uint8" else (batch, *planes)
    taken = replace(known.inputs[0], name="x", dtype=dtype, shape=shape)
    text = manifest.seal(replace(known, inputs=(taken,)))
    manifest.manifest_path(copy).write_text(text)
    assert open_artifact(str(copy)).input_format is input_format


def test_what_is_said_of_a_checkpoint_needs_one(tmp_path) -> None:
    graph = str(copy_of(classifier(), tmp_path))
    with pytest.raises(SpecError) as raised:
        open_pair(graph, graph, Choices(weights="model_ema"))
    assert str(raised.value) == (
        "--variant, --weights and --labels are for a checkpoint, and neither side is one"
    )
