"""What ``msn-export fit`` refuses is one line, and leaves nothing."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import msn_export
from msn_export.cli import main
from msn_export.commands import fit as steps
from msn_export.commands.fit import FitJob, run_fit
from msn_export.errors import MsnExportError
from msn_export.models.config import VitConfig
from msn_export.models.vit import VitMsn
from msn_export.spec import Head, KeptPatches
from tests.builders.checkpoints import hugging_face
from tests.builders.labelled import noise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three pictures each."""
    return noise(tmp_path / "set", each=3, classes=2)


def refused(checkpoint: Path, labelled: Path, tmp_path: Path, **options: Any) -> str:
    """Run, and give the one line; nothing may be left."""
    output = tmp_path / "out"
    output.mkdir()
    job = FitJob(str(checkpoint), output / "m.onnx", labelled=labelled, **options)
    with pytest.raises(MsnExportError) as error:
        run_fit(job)
    assert list(output.iterdir()) == []
    assert str(error.value).isprintable()
    return str(error.value)


def one_class(folder: Path) -> None:
    for path in (folder / "class 00001").iterdir():
        path.rename(folder / "class 00000" / path.name)
    (folder / "class 00001").rmdir()


def empty_class(folder: Path) -> None:
    (folder / "class 00002").mkdir()


def one_picture_twice(folder: Path) -> None:
    content = (folder / "class 00000" / "000000.png").read_bytes()
    (folder / "class 00001" / "copy.png").write_bytes(content)


def control_characters(folder: Path) -> None:
    (folder / "class 00001").rename(folder / "class\x1b[2J")


def unreadable_class(folder: Path) -> None:
    for path in (folder / "class 00001").iterdir():
        path.write_bytes(path.read_bytes()[:50])


def one_image(folder: Path) -> None:
    for path in sorted((folder / "class 00001").iterdir())[1:]:
        path.unlink()


def one_readable(folder: Path) -> None:
    for path in sorted((folder / "class 00001").iterdir())[1:]:
        path.write_bytes(path.read_bytes()[:50])


def nothing(folder: Path) -> None:
    pass


PICTURES = [
    (one_class, {}, "has 1 class (class 00000); a classifier needs two or more"),
    (empty_class, {}, "has 1 class (class 00002) without a picture that can be read; remove the"),
    (one_picture_twice, {}, "has one picture in two classes: "),
    (control_characters, {}, "the class 'class\\x1b[2J' is not printable text; rename it"),
    (
        unreadable_class,
        {},
        "class 'class 00001' of {folder} has no picture that gives features; the first: {folder}",
    ),
    (
        unreadable_class,
        {"shots": 2, "draws": 1},
        "class 'class 00001' of {folder} has no drawn picture that gives features; the first: ",
    ),
    (
        one_image,
        {"C": None},
        "--C auto cross-validates inside the training images, and class 'class 00001' of {folder} "
        "has 1; give two or more of each, or a number for --C",
    ),
    (one_readable, {"C": None}, "and class 'class 00001' of {folder} has 1; give two or more of"),
    (
        nothing,
        {"shots": 4},
        "{folder} has 2 classes (class 00000 has 3, class 00001 has 3) with fewer than 4 pictures; "
        "choose --shots 3 or less, or add pictures",
    ),
]


@pytest.mark.parametrize(
    ("spoil", "options", "message"), PICTURES, ids=[f"{s.__name__} {o}" for s, o, _ in PICTURES]
)
def test_pictures_that_make_no_classifier_are_refused(
    checkpoint, folder, tmp_path, spoil, options, message
) -> None:
    spoil(folder)
    found = refused(checkpoint, folder, tmp_path, **options)
    assert message.format(folder=folder) in found


def test_a_table_that_names_no_file_is_refused(checkpoint, folder, tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nset/none.png,a\nset/class 00001/000001.png,b\n")
    found = refused(checkpoint, table, tmp_path)
    assert "labels.csv names 1 file (" in found
    assert "does not exist; paths are relative to the table" in found


def test_a_test_set_with_another_class_is_refused(checkpoint, folder, tmp_path) -> None:
    other = noise(tmp_path / "test", each=2, classes=3, first=90)
    found = refused(checkpoint, folder, tmp_path, test=other)
    assert f"{other} has 1 class (class 00002) that {folder} lacks" in found


MODELS = [
    ({"blocks": 3}, "blocks 3 is out of range; expected 1 to 2"),
    (
        {"heads": (Head.ATTENTION,), "keep_patches": KeptPatches(0.5)},
        "head attention is a map of all patches; leave --keep-patches out",
    ),
    ({"keep_patches": KeptPatches(0.01)}, "0.01 of 16 patches is less than one; keep more"),
]


@pytest.mark.parametrize(("options", "message"), MODELS, ids=["blocks", "attention", "patches"])
def test_what_the_model_cannot_do_is_refused_before_any_picture_is_run(
    checkpoint, folder, tmp_path, monkeypatch, options, message
) -> None:
    monkeypatch.setattr(steps, "run_onnx", None)
    assert message in refused(checkpoint, folder, tmp_path, **options)


@pytest.mark.parametrize("features", ["msn", "embedding"])
def test_a_checkpoint_without_a_final_layer_norm_is_refused(folder, tmp_path, features) -> None:
    torch.manual_seed(0)
    shape = VitConfig((32, 32), (8, 8), 3, 64, 2, 2, 128, labels=("a", "b"), pooling="patches")
    with pytest.raises(MsnExportError) as error:
        msn_export.fit(VitMsn(shape).eval(), folder, tmp_path / "m.onnx", features=features)
    assert str(error.value) == (
        "checkpoint memory:VitMsn: it has no final LayerNorm (its own classifier reads the mean of "
        "the last block's patches); give the pre-trained checkpoint"
    )


def test_more_than_the_memory_holds_is_refused(checkpoint, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(steps, "available_memory", lambda: 3000)
    assert refused(checkpoint, folder, tmp_path) == (
        "6 images of 64 numbers in 2 classes need 0.0 GiB, and 0.0 are free; choose fewer with "
        "--shots, or a machine with more memory"
    )


def test_a_missing_scikit_learn_is_said_before_any_work(
    checkpoint, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'msn-export[fit]'" in refused(checkpoint, folder, tmp_path)


def test_an_output_that_exists_is_kept(checkpoint, folder, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    output.write_text("mine")
    result = CliRunner().invoke(main, ["fit", str(checkpoint), str(folder), "-o", str(output)])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: output {output} exists; --force replaces it, -o writes elsewhere\n"
    )
    assert output.read_text() == "mine"


def test_no_optimum_is_an_error_and_another_strength_goes_on_from_the_features(
    checkpoint, folder, tmp_path
) -> None:
    job = FitJob(str(checkpoint), tmp_path / "m.onnx", labelled=folder, C=1e15)
    with pytest.raises(MsnExportError, match=r"did not reach its optimum at C = 1e\+15: after"):
        run_fit(job)
    assert not job.output.exists()
    assert (tmp_path / "m.onnx.fit" / "training.npy.parts").is_dir()
    run_fit(FitJob(str(checkpoint), tmp_path / "m.onnx", labelled=folder))
    assert not (tmp_path / "m.onnx.fit").exists()


def test_a_graph_that_is_not_what_was_fitted_is_not_written(
    checkpoint, folder, tmp_path, monkeypatch
) -> None:
    real = steps.LinearClassifier

    def mixed_up(weight: np.ndarray, *rest: Any) -> Any:
        return real(np.ascontiguousarray(weight[::-1]), *rest)  # the classes are swapped

    monkeypatch.setattr(steps, "LinearClassifier", mixed_up)
    job = FitJob(str(checkpoint), tmp_path / "m.onnx", labelled=folder)
    with pytest.raises(MsnExportError) as error:
        run_fit(job)
    assert str(error.value).startswith(
        "the graph's logits err by 2.0e+00 of scikit-learn's decision function on PyTorch's "
        "features, "
    )
    assert str(error.value).endswith(" allowed, on 6 images")
    assert not job.output.exists()


def test_errors_in_python_name_arguments(checkpoint, folder, tmp_path) -> None:
    with pytest.raises(MsnExportError, match=r"^draws repeats the draw of shots; give shots too$"):
        msn_export.fit(str(checkpoint), folder, tmp_path / "m.onnx", draws=2)
    with pytest.raises(MsnExportError, match=r"choose shots 3 or less"):
        msn_export.fit(str(checkpoint), folder, tmp_path / "m.onnx", shots=4)
    one_image(folder)
    with pytest.raises(MsnExportError, match=r"^C auto cross-validates .* or a number for C$"):
        msn_export.fit(str(checkpoint), folder, tmp_path / "m.onnx", C="auto")
