"""Every command is a function: paths and choices as text, models in memory, errors of arguments."""

import copy
import importlib
import inspect
import pkgutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel

import msn_export
from msn_export.errors import MsnExportError
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.config import LinearClassifier
from msn_export.models.vit import VitMsn
from tests.builders.engine_builds import NEEDS_RTX
from tests.builders.tiny_artifacts import classifier, pictures

FUNCTIONS = [name for name in msn_export.__all__ if name[0].islower()]


def config(**changes: object) -> ViTMSNConfig:
    shape = {
        "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 3,
    }  # fmt: skip
    return ViTMSNConfig(**{**shape, **changes})


@pytest.fixture(scope="module")
def model() -> ViTMSNForImageClassification:
    torch.manual_seed(0)
    return ViTMSNForImageClassification(config()).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A folder of pictures."""
    return pictures(tmp_path_factory.mktemp("api"), 12)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory):
    """A tiny classifier as an ONNX file, its checkpoint beside it."""
    return classifier(tmp_path_factory.mktemp("graph"))


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)


def ran(path, images) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def test_modules_leave_the_functions_their_names() -> None:
    for found in pkgutil.walk_packages(msn_export.__path__, "msn_export."):
        if not found.name.endswith(("__main__", "cluster.serve")):
            importlib.import_module(found.name)
    for name in FUNCTIONS:
        assert inspect.isfunction(getattr(msn_export, name)), name


def test_every_command_is_a_function_and_every_job_is_there() -> None:
    from msn_export.cli import main

    named = {"onnx": "export", "trt": "compile"}
    assert {named.get(name, name) for name in main.commands} | {"load"} == set(FUNCTIONS)
    assert {name for name in msn_export.__all__ if name.endswith("Job")} == {
        f"{name.title()}Job" for name in main.commands
    } - {"InspectJob", "DoctorJob"}


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, msn_export; print([m for m in sys.modules if 'msn_export' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['msn_export']"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_lists_every_argument_with_a_sentence(name) -> None:
    function = getattr(msn_export, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in text or name in {"inspect", "doctor"}, parameter
    assert "Raises:" in text


def test_a_path_is_exported_validated_and_run(model, folder, tmp_path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    exported = msn_export.export(
        str(tmp_path / "checkpoint"), str(tmp_path / "m.onnx"), heads=["cls", "logits"],
        batch="1:2:4", images=str(folder), preprocess="hf",
    )  # fmt: skip
    path, manifest = exported
    assert manifest.check.passed
    found = msn_export.validate(tmp_path / "checkpoint", path, images=folder, limit="all")
    assert found.passed
    runner = msn_export.load(path)
    try:
        picture = min(folder.rglob("*.png"))
        assert runner(picture).logits.shape == (1, 3)
    finally:
        runner.close()
    same = msn_export.drift(path, path)
    assert same.passed


@pytest.mark.parametrize("kind", [ViTMSNModel, ViTMSNForImageClassification])
def test_a_model_of_transformers_is_exported_from_memory(kind, tmp_path) -> None:
    torch.manual_seed(1)
    model = kind(config())
    before = copy.deepcopy(model.state_dict())
    assert model.training
    path, manifest = msn_export.export(model, tmp_path / "m.onnx")
    assert manifest.checkpoint.source == f"memory:{kind.__name__}"
    images = pixels()
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(images))
    wanted = out.logits if kind is ViTMSNForImageClassification else out.last_hidden_state[:, 0]
    np.testing.assert_allclose(ran(path, images), wanted.numpy(), atol=2e-5)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert msn_export.validate(model, path).passed


def test_a_classifier_is_fitted_on_a_model_in_memory(model, folder, tmp_path) -> None:
    fitted = msn_export.fit(
        model, str(folder), str(tmp_path / "c.onnx"), shots=4, draws=2, C=4000, features="embedding"
    )
    assert fitted.manifest.labels == ("a", "b")
    assert fitted.summary()["accuracy"] == fitted.manifest.fit.accuracy.top1
    assert (fitted.manifest.fit.C, len(fitted.manifest.fit.accuracy.draws)) == (4000.0, 2)
    assert msn_export.validate(model, fitted.path).passed
    with msn_export.load(fitted.path) as runner:
        (guesses,) = runner.top_k(runner(min(folder.rglob("*.png"))).logits, k=2)
    assert {guess.label for guess in guesses} == {"a", "b"}


def test_our_own_model_with_a_classifier_is_exported_from_memory(graph, tmp_path) -> None:
    model = load_checkpoint(str(graph.parent / "checkpoint")).model
    rows = np.random.default_rng(0).standard_normal((4, 2 * model.config.dim), np.float32)
    other = model.with_classifier(LinearClassifier(rows, tuple("abcd"), "features", 2))
    path, manifest = msn_export.export(other, tmp_path / "m.onnx")
    assert (manifest.labels, manifest.config["pooling"]) == (tuple("abcd"), "features")
    images = torch.from_numpy(pixels())
    with torch.no_grad():
        wanted = other.classify(other.hidden(images)).numpy()
    np.testing.assert_allclose(ran(path, pixels()), wanted, atol=2e-5)


def test_our_own_model_is_exported_from_memory(graph, tmp_path) -> None:
    model = load_checkpoint(str(graph.parent / "checkpoint")).model
    assert isinstance(model, VitMsn)
    path, _ = msn_export.export(model, tmp_path / "m.onnx", heads="tokens")
    size = model.config.image_size
    images = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(ran(path, images), wanted, atol=2e-5)


def test_a_model_that_is_no_vit_msn_is_refused(tmp_path) -> None:
    with pytest.raises(MsnExportError, match="'memory:Linear'"):
        msn_export.export(torch.nn.Linear(2, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_model_that_is_gone_is_refused(tmp_path) -> None:
    with pytest.raises(MsnExportError) as error:
        msn_export.export("memory:ViTMSNModel", tmp_path / "m.onnx")
    assert str(error.value) == (
        "checkpoint 'memory:ViTMSNModel' was a model in memory; give a checkpoint that was saved "
        "of it"
    )


@NEEDS_RTX
def test_a_graph_is_compiled(graph, tmp_path) -> None:
    built = msn_export.compile(
        graph, tmp_path / "m.engine", precision="fp16", backend="tensorrt-rtx",
        capabilities=["8.9"], workspace="1GiB",
    )  # fmt: skip
    assert built.manifest.engine.precision == "fp16"
    assert msn_export.inspect(built.path).precision == "fp16"


def test_a_graph_is_calibrated(graph, folder, tmp_path) -> None:
    quantised = msn_export.calibrate(
        str(graph), "int8", str(folder), tmp_path / "m.int8.onnx", smooth="off",
        compile=False, gate_cosine=0.5,
    )  # fmt: skip
    assert quantised.manifest.dtype == "int8"


WRONG = [
    (
        {"heads": ["clss"]},
        "heads is 'clss'; expected cls, mean, tokens, logits, features or attention",
    ),
    ({"dtype": "fp64"}, "dtype is 'fp64'; expected fp32, fp16 or bf16"),
    ({"batch": "8:1:2"}, "batch"),
    ({"simplify": 3}, "simplify is 3; expected bool"),
    ({"head": "cls"}, "'head' is no argument; expected some of checkpoint, output, variant"),
    ({}, "output m.onnx exists; force=True replaces it, output writes elsewhere"),
    ({"image_size": 33}, "image height 33 is not divisible"),
    ({"weights": "x"}, "weights"),
    ({"target": "tensorrt-8", "dtype": "bf16"}, "bf16 needs opset 22"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_argument_is_named_as_an_argument(options, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not options:
        (tmp_path / "m.onnx").touch()
    with pytest.raises(MsnExportError) as error:
        msn_export.export("random:vit-msn-small", "m.onnx", **options)
    assert words in str(error.value)
    assert "--" not in str(error.value)
    assert "Job" not in str(error.value)


def test_an_attribute_that_is_none_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'msn_export' has no attribute 'exprot'"):
        msn_export.exprot  # noqa: B018
    assert {"export", "load"} <= set(dir(msn_export))


def test_progress_is_shown_on_stderr_or_handed_on(graph, capsys) -> None:
    msn_export.validate(graph, graph, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert " s  " in shown.err


def test_a_result_is_a_line_and_a_table(graph) -> None:
    found = msn_export.validate(graph, graph)
    assert repr(found).startswith("Validation(passed=True")
    assert len(repr(found)) < 300
    assert "<th>passed</th><td>True</td>" in found._repr_html_()
    assert "<script" not in found._repr_html_()


def test_python_m_runs_the_command_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "msn_export", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"msn-export, version {msn_export.__version__}"
