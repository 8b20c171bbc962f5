"""A repository is written whole or not at all, and says what the artifact is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from msn_export import image_folder, images, manifest
from msn_export.commands.triton import run_lint
from msn_export.onnx_header import UNSEALED
from msn_export.triton_server import config as messages
from tests.builders.artifacts import alone, classifier
from tests.builders.triton_artifacts import GRAPH, LABELS, graph, plan
from tests.builders.triton_runs import config_of, invoke, refused

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def test_a_graphs_configuration_is_what_the_backend_wants(tmp_path) -> None:
    graph(tmp_path / "cats.onnx")
    result = invoke(tmp_path / "cats.onnx", "-o", tmp_path / "repo", "--instances", 2)
    assert result.exit_code == 0, result.output
    config = config_of(tmp_path / "repo", "cats/config.pbtxt")
    assert (config.name, config.platform, config.backend) == (
        "cats",
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [3, 8, 8]
    assert messages.datatype_name(config.input[0].data_type) == "TYPE_FP32"
    assert [(o.name, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", [3], "labels.txt"),
        ("embedding", [3], ""),
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert not config.dynamic_batching.preferred_batch_size
    assert config.version_policy.latest.num_versions == 1
    assert not config.response_cache.enable
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, messages.module().ModelInstanceGroup.KIND_AUTO)
    gpu = config_of(tmp_path / "repo", "cats/configs/gpu.pbtxt")
    assert gpu.instance_group[0].kind == messages.module().ModelInstanceGroup.KIND_GPU
    assert (tmp_path / "repo/cats/labels.txt").read_text() == "cat\ndog\na bird\n"
    assert manifest.read(tmp_path / "repo/cats/1/model.onnx") == manifest.read(
        tmp_path / "cats.onnx"
    )


def test_a_graph_of_a_fixed_batch_is_served_without_batching(tmp_path) -> None:
    graph(tmp_path / "m.onnx", batch=1)
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo").exit_code == 0
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [1, 3, 8, 8]
    assert list(config.output[0].dims) == [1, 3]
    assert not config.HasField("dynamic_batching")
    line = refused(tmp_path / "m.onnx", "-o", tmp_path / "other", "--max-batch", 8)
    assert "--max-batch 8: m.onnx has a fixed batch of 1, which Triton cannot batch" in line
    assert "build it with --batch 1:8:8" in line


def test_an_engines_configuration_names_the_release_that_loads_it(tmp_path) -> None:
    plan(tmp_path / "m.engine", version="10.13.3.9")
    result = invoke(tmp_path / "m.engine", "-o", tmp_path / "repo", "--json")
    told = json.loads(result.stdout)
    assert (told["release"], told["image"]) == ("25.10", "nvcr.io/nvidia/tritonserver:25.10-py3")
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.parameters["triton_release"].string_value == "25.10"
    assert not config.instance_group[0].profile
    assert (tmp_path / "repo/m/1/model.plan").is_file()
    readme = (tmp_path / "repo/m/README.md").read_text()
    assert "nvcr.io/nvidia/tritonserver:25.10-py3" in readme
    assert "has TensorRT 10.13.3.9; the engine was built by 10.13.3.9" in " ".join(readme.split())
    assert "Engine: no engine: bytes of a test." in readme


def test_what_nobody_checked_is_noted(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    told = json.loads(invoke(path, "-o", tmp_path / "repo", "--json").stdout)
    assert told["notes"] == ["m.onnx was never compared with its source (--no-check)"]


def test_an_ensemble_puts_the_normalisation_before_the_model(tmp_path) -> None:
    graph(tmp_path / "m.onnx")
    options = ("--ensemble", "--max-batch", 4)
    assert invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo", *options).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == [
        "m",
        "m-images",
        "m-preprocess",
    ]
    ensemble = config_of(tmp_path / "repo", "m-images/config.pbtxt")
    assert ensemble.platform == "ensemble"
    assert ensemble.max_batch_size == 4
    assert (ensemble.input[0].name, list(ensemble.input[0].dims)) == ("images", [8, 8, 3])
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == ["m-preprocess", "m"]
    graph(tmp_path / "u.onnx", input_format="uint8")
    line = refused(tmp_path / "u.onnx", "-o", tmp_path / "repo", "--ensemble")
    assert "--ensemble: u.onnx takes uint8 images itself" in line


@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("input_format", ["float", "uint8"])
def test_warm_up_data_is_a_picture_as_the_model_takes_it(
    input_format, batch, tmp_path, photographs
) -> None:
    path = graph(tmp_path / "m.onnx", input_format=input_format, batch=batch)
    assert invoke(path, "-o", tmp_path / "repo", "--warmup", "--images", photographs).exit_code == 0
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    data = (tmp_path / "repo/m/warmup/input.bin").read_bytes()
    known = manifest.read(path)
    assert known is not None
    assert known.preprocessing is not None
    loaded = image_folder.load(photographs, known.preprocessing, 16)
    pixels = loaded.pixels[: 2 if batch == 2 else 1]
    wanted = pixels if input_format == "uint8" else images.normalize(pixels, known.preprocessing)
    assert data == wanted.tobytes()
    assert (
        [sample.batch_size for sample in config.model_warmup] == [1] if batch == 2 else [1, 4, 16]
    )


def test_weights_beside_a_foreign_graph_come_along(tmp_path) -> None:
    text = GRAPH.format(
        input="float[batch,3,8,8] pixel_values", batch="batch", cast="x = Identity (pixel_values)"
    )
    model = onnx.parser.parse_model(text)
    (weights,) = model.graph.initializer
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights), "w"))
    onnx.save_model(
        model, tmp_path / "m.onnx", save_as_external_data=True,
        location="m.onnx.data", size_threshold=0,
    )  # fmt: skip
    result = invoke(tmp_path / "m.onnx", "-o", tmp_path / "repo", "--ensemble", "--json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "repo/m/1/m.onnx.data").is_file()
    assert json.loads(result.stdout)["notes"] == [
        "m.onnx has no manifest: nothing says what it is or whether it was checked",
        "preprocessing hf was assumed: nothing says how the model's pictures are made, "
        "--preprocess does",
    ]
    assert config_of(tmp_path / "repo", "m/config.pbtxt").max_batch_size == 32


def test_a_model_that_is_there_is_replaced_only_by_force(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    assert invoke(path, "-o", tmp_path / "repo").exit_code == 0
    before = (tmp_path / "repo/m/config.pbtxt").read_text()
    assert "model m is in" in refused(path, "-o", tmp_path / "repo")
    (tmp_path / "repo/m/stray").write_text("of the user's")
    assert invoke(path, "-o", tmp_path / "repo", "--force", "--max-batch", 8).exit_code == 0
    assert (tmp_path / "repo/m/config.pbtxt").read_text() != before
    assert not (tmp_path / "repo/m/stray").exists()
    other = ("-o", tmp_path / "repo", "--name", "second")
    assert invoke(path, *other).exit_code == 0
    assert sorted(entry.name for entry in (tmp_path / "repo").iterdir()) == ["m", "second"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json", "repo"]


def test_a_new_version_goes_beside_the_old_one_under_its_configuration(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    assert invoke(path, "-o", tmp_path / "repo", "--warmup").exit_code == 0
    before = (tmp_path / "repo/m/config.pbtxt").read_text()
    newer = graph(tmp_path / "n.onnx", scale=2.0)
    add = ("-o", tmp_path / "repo", "--name", "m", "--model-version", 2)
    result = invoke(newer, *add)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "repo/m/2/model.onnx").read_bytes() == newer.read_bytes()
    assert (tmp_path / "repo/m/config.pbtxt").read_text() == before
    assert "has a version 2; give a higher --model-version" in refused(newer, *add)
    other = graph(tmp_path / "o.onnx", labels=LABELS[::-1])
    line = refused(other, *add[:-1], 3)
    assert "labels.txt is not what the manifest of 3/model.onnx calls its classes" in line
    static = graph(tmp_path / "s.onnx", batch=2)
    assert "3/model.onnx takes a batch of 2 alone" in refused(static, *add[:-1], 3)
    assert not (tmp_path / "repo/m/3").exists()
    assert "whose configuration stays; leave" in refused(newer, *add[:-1], 3, "--warmup")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--max-batch", 4), "--max-batch"),
        (("--instances", 2, "--queue-delay", 9), "--instances and --queue-delay"),
        (("--release", "25.12"), "--release"),
        (("--response-cache", "--ensemble"), "--ensemble and --response-cache"),
    ],
)
def test_a_new_version_changes_no_configuration(tmp_path, options, told) -> None:
    path = graph(tmp_path / "m.onnx")
    assert invoke(path, "-o", tmp_path / "repo", "--release", "25.10").exit_code == 0
    add = (path, "-o", tmp_path / "repo", "--model-version", 2)
    assert refused(*add, *options) == (
        f"error: --model-version 2 adds to {tmp_path / 'repo' / 'm'}, whose configuration stays; "
        f"leave {told} out"
    )
    written = json.loads(invoke(*add, "--json").stdout)
    assert written["release"] == "25.10"  # as it was written for


@pytest.mark.parametrize("config", [b"\xff\xfe", b"nonsense {", None])
def test_a_new_version_of_a_model_whose_configuration_is_none_is_refused(tmp_path, config) -> None:
    path = graph(tmp_path / "m.onnx")
    (tmp_path / "repo" / "m").mkdir(parents=True)
    if config is not None:
        (tmp_path / "repo" / "m" / "config.pbtxt").write_bytes(config)
    assert refused(path, "-o", tmp_path / "repo", "--model-version", 2)
    assert not (tmp_path / "repo" / "m" / "2").exists()


def test_a_failure_on_the_way_in_leaves_the_repository_as_it_was(tmp_path, monkeypatch) -> None:
    path = graph(tmp_path / "m.onnx")
    assert invoke(path, "-o", tmp_path / "repo").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "repo").rglob("*") if p.is_file()}
    rename, moves = Path.rename, []

    def fail_at_the_last(self, target):
        moves.append(target)
        if Path(target).name == "m-images":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last)
    line = refused(path, "-o", tmp_path / "repo", "--force", "--ensemble", "--max-batch", 2)
    monkeypatch.undo()
    assert "No space left on device" in line
    assert {p: p.read_bytes() for p in (tmp_path / "repo").rglob("*") if p.is_file()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json", "repo"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../m", "must be letters, digits, dots, dashes and underscores"),
        (".hidden", "must be letters"),
        ("a b", "must be letters"),
        ("", "must be letters"),
    ],
)
def test_a_name_is_a_folders(name, message, tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    assert message in refused(path, "-o", tmp_path / "repo", "--name", name or "-")


def test_a_graph_without_its_manifest_is_served_as_its_own_file_says(tmp_path) -> None:
    lone = alone(classifier(), tmp_path / "lone.onnx")
    result = invoke(lone, "-o", tmp_path / "repo", "--name", "cats", "--ensemble", "--json")
    assert result.exit_code == 0, result.output
    notes = json.loads(result.stdout)["notes"]
    assert "lone.onnx has no manifest: nothing says whether it was checked" in notes
    assert f"lone.onnx: {UNSEALED}" in notes
    assert (tmp_path / "repo/cats/labels.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    readme = (tmp_path / "repo/cats/README.md").read_text()
    assert 'known = manifest.read_stated(Path("repo/cats/1/model.onnx"))' in readme
    assert not [issue for issue in run_lint(tmp_path / "repo", None) if issue.level == "wrong"]


def test_an_artifact_its_manifest_does_not_describe_is_refused(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    graph(path, manifest=False, scale=3.0)
    assert "is not the file its manifest describes" in refused(path, "-o", tmp_path / "repo")


def test_cuda_graphs_are_for_engines(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    assert "only Triton's tensorrt backend has them" in refused(
        path, "-o", tmp_path / "repo", "--cuda-graphs"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give ARTIFACT and -o REPO, or --lint REPO"),
        (["--lint", ".", "-o", "x"], "--lint takes a repository alone"),
        (["--max-batch", "0"], "'--max-batch'"),
        (["nowhere.onnx", "-o", "x"], "'nowhere.onnx' does not exist"),
        ([__file__, "-o", "x", "--images", "."], "--images is what --warmup runs"),
    ],
)
def test_usage_is_told(arguments, message) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_without_the_extra_the_message_has_the_line_that_installs_it(tmp_path) -> None:
    path = graph(tmp_path / "m.onnx")
    script = (
        "import sys; sys.modules['tritonclient'] = None; from msn_export.cli import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "triton", path, "-o", tmp_path / "repo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "error: package tritonclient[grpc] is not installed; pip install 'msn-export[triton]'"
    )


@pytest.mark.parametrize(
    "code",
    ["import msn_export.cli", "import msn_export.commands.onnx, msn_export.commands.trt",
     "import msn_export.commands.triton"],
)  # fmt: skip
def test_tritonclient_is_imported_by_its_command_alone(code) -> None:
    script = f"import sys; {code}; print([n for n in ('tritonclient', 'grpc') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_stand_ins_arithmetic_depends_on_each_pixel(tmp_path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph(tmp_path / "m.onnx")))
    batch = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    one = session.run(["logits"], {"pixel_values": batch})[0]
    batch[0, 1, 2, 3] += 1
    other = session.run(["logits"], {"pixel_values": batch})[0]
    assert not np.array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
