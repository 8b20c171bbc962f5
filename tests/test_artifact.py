"""An ONNX file as a command takes it: ours by its manifest, another tool's if it is understood."""

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from msn_export import manifest
from msn_export.artifact import DYNAMIC, Artifact, GraphFile
from msn_export.cli import main
from msn_export.errors import GraphError, ManifestError, ToleranceError
from msn_export.graph import io
from msn_export.graph.precision import PRODUCTS, graph_dtype
from msn_export.onnx_header import UNSEALED, GraphMetadata
from msn_export.preprocessing import assumed, preset
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.spec import BatchRange, Dtype, ImageSize, InputFormat, Target
from tests.builders.artifacts import alone, classifier, copy_of, rewrite
from tests.builders.checkpoints import hugging_face, processor
from tests.builders.graphs import parse


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    hugging_face(folder / "hf", labels=3)
    processor(folder / "hf", size=32, resample=3)
    for name, options in {
        "m.onnx": ["--batch", "2:3:5"],
        "bytes.onnx": ["--input", "uint8", "--dtype", "fp16"],
    }.items():
        arguments = ["onnx", str(folder / "hf"), "-o", str(folder / name), "--no-check", *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    return folder


def test_our_own_file_is_what_its_manifest_says(ours) -> None:
    source = GraphFile.read(ours / "m.onnx")
    assert source.manifest is not None
    assert source.manifest.labels == ("class 0", "class 1", "class 2")
    assert source.preprocessing == source.manifest.preprocessing
    assert source.preprocessing.resample == "bicubic"
    assert (source.input_format, source.dtype, source.size) == (
        InputFormat.FLOAT,
        Dtype.FP32,
        ImageSize(32, 32),
    )
    assert source.batch == BatchRange(2, 3, 5)
    assert source.notes == ()


def test_bytes_and_half_precision_are_told_apart(ours) -> None:
    source = GraphFile.read(ours / "bytes.onnx")
    assert (source.input_format, source.dtype) == (InputFormat.UINT8, Dtype.FP16)


def test_without_its_manifest_it_is_what_its_own_file_says(ours, tmp_path) -> None:
    path = alone(ours / "m.onnx", tmp_path / "lone.onnx")
    source, sealed = GraphFile.read(path), GraphFile.read(ours / "m.onnx")
    assert source.manifest is None
    assert (source.labels, source.scores) == (sealed.labels, sealed.scores)
    assert source.preprocessing == sealed.preprocessing
    assert source.notes == (
        "lone.onnx has no manifest; simplification nothing left to simplify",
        f"lone.onnx: {UNSEALED}",
    )
    assert Artifact.open(path).notes == (f"lone.onnx: {UNSEALED}",)


def test_what_the_file_says_has_to_fit_its_graph(ours, tmp_path) -> None:
    other = GraphMetadata(preset("hf", ImageSize(64, 64)), target=Target.TENSORRT).props()
    path = alone(ours / "m.onnx", tmp_path / "lone.onnx", **other)
    with pytest.raises(
        ManifestError, match=r"lone\.onnx takes images of 32x32 with 3 channels, and"
    ):
        GraphFile.read(path)
    with pytest.raises(ManifestError, match="makes them of 64x64 with 3; export it again"):
        _ = Artifact.open(path).preprocessing


def test_a_manifest_that_differs_from_its_file_is_refused(ours, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((ours / "m.onnx").read_bytes())
    written = manifest.read(ours / "m.onnx")
    assert written is not None
    changed = replace(written, labels=("dog", *written.labels[1:]), scores=None)
    manifest.manifest_path(path).write_text(manifest.seal(changed))
    with pytest.raises(ManifestError) as raised:
        Artifact.open(path)
    assert str(raised.value) == (
        f"{path}.json and {path} say different things of its labels, scores; one of the two was "
        "changed: export it again, or take the manifest away to use the file's"
    )
    examined = Artifact.examine(path)  # inspect shows what the file says, and why
    assert examined.distrusted == str(raised.value)
    assert examined.labels == written.labels


def test_a_manifest_of_before_the_metadata_was_whole_is_believed(ours, tmp_path) -> None:
    written = manifest.read(ours / "m.onnx")
    assert written is not None
    props = {"product": "msn-export 0.1.0", "preprocessing": "null"}
    path = alone(ours / "m.onnx", tmp_path / "m.onnx", **props)
    size = path.stat().st_size
    known = replace(written, sha256=manifest.sha256_of(path), bytes=size, target="tensorrt-8")
    manifest.manifest_path(path).write_text(manifest.seal(known))
    assert Artifact.open(path).manifest == known


def test_a_graph_of_another_tool_is_read_as_anyones(ours, tmp_path) -> None:
    path = alone(ours / "bytes.onnx", tmp_path / "theirs.onnx", product="")
    source = GraphFile.read(path)
    assert source.manifest is None
    assert (source.input_format, source.dtype, source.batch) == (
        InputFormat.UINT8,
        Dtype.FP16,
        DYNAMIC,
    )
    assert source.preprocessing == assumed(ImageSize(32, 32))
    assert source.notes == (
        "theirs.onnx has no manifest; simplification nothing left to simplify",
        *source.preprocessing.notes,
    )
    chosen = GraphFile.read(path, "raw", "ignore")
    assert chosen.preprocessing == replace(preset("raw", ImageSize(32, 32)), exif="ignore")
    assert len(chosen.notes) == 1


def test_a_file_that_is_not_its_manifests_is_refused(ours, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((ours / "bytes.onnx").read_bytes())
    beside = manifest.manifest_path(path)
    beside.write_bytes(manifest.manifest_path(ours / "m.onnx").read_bytes())
    with pytest.raises(ManifestError, match="is not the file its manifest describes"):
        GraphFile.read(path)


def test_a_manifest_without_profiles_does_not_keep_the_file_from_being_read(ours, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes((ours / "m.onnx").read_bytes())
    written = manifest.read(ours / "m.onnx")
    assert written is not None
    manifest.manifest_path(path).write_text(manifest.seal(replace(written, profiles=())))
    assert GraphFile.read(path).batch == DYNAMIC


@pytest.mark.parametrize(
    ("name", "held", "stated"),
    [("m.onnx", "fp32", Dtype.FP16), ("m.onnx", "fp32", Dtype.BF16), ("m.onnx", "fp32", Dtype.INT8),
     ("bytes.onnx", "fp16", Dtype.BF16), ("bytes.onnx", "fp16", Dtype.FP32)],
)  # fmt: skip
def test_a_type_that_the_graph_does_not_have_is_refused(ours, tmp_path, name, held, stated) -> None:
    path = copy_of(ours / name, tmp_path)
    names = [value.name for node in io.load(path).graph for value in node.outputs]
    rewrite(path, dtype=stated, islands=dict.fromkeys(names, 1e5))
    with pytest.raises(ManifestError) as raised:
        _ = Artifact.open(path).dtype
    assert str(raised.value) == (
        f"{path}.json says {stated}, and {path} computes in {held}; export it again"
    )
    with pytest.raises(ManifestError):
        GraphFile.read(path)


def test_an_fp16_graph_may_have_most_weights_in_fp32_islands(ours, tmp_path) -> None:
    graph = Artifact.open(ours / "m.onnx").graph
    products = [node.outputs[0].name for node in graph.graph if node.op_type in PRODUCTS]
    (tmp_path / "islands.json").write_text(json.dumps(dict.fromkeys(products[1:], 1e5)))
    path = tmp_path / "islands.onnx"
    arguments = ["onnx", str(ours / "hf"), "-o", str(path), "--no-check", "--dtype", "fp16"]
    result = CliRunner().invoke(main, [*arguments, "--islands", str(tmp_path / "islands.json")])
    assert result.exit_code == 0, result.output
    opened = Artifact.open(path)
    assert graph_dtype(opened.graph) is Dtype.FP32
    assert opened.dtype is GraphFile.read(path).dtype is Dtype.FP16
    rewrite(path, islands={})
    with pytest.raises(ManifestError, match=r"says fp16, and .*islands\.onnx computes in fp32;"):
        _ = Artifact.open(path).dtype


def test_a_graph_is_asked_for_its_golden_result_where_it_has_one(ours) -> None:
    path = classifier()
    source = GraphFile.read(path)
    with OrtRunner(path) as runner:
        source.require_golden(runner)
        source.manifest = replace(source.manifest, golden=replace(source.manifest.golden, limit=0))
        with pytest.raises(ToleranceError, match=r"m\.onnx does not give the golden result in its"):
            source.require_golden(runner)
    with OrtRunner(ours / "m.onnx") as runner:  # exported without a check
        GraphFile.read(ours / "m.onnx").require_golden(runner)


# --- graphs of other tools ------------------------------------------------------------------------


def save(text: str, path: Path, *, opset: int = 23) -> Path:
    io.save(parse(text, opset=opset), path)
    return path


def test_an_older_opset_is_raised(tmp_path) -> None:
    text = "g (float[b,3,8,8] x) => (float[b,3,8,8] y) { y = Relu (x) }"
    source = GraphFile.read(save(text, tmp_path / "m.onnx", opset=17))
    assert source.graph.graph.opset_imports[""] == 23


def test_a_fixed_batch_is_the_only_one(tmp_path) -> None:
    text = "g (float[4,1,8,16] x) => (float[4,1,8,16] y) { y = Relu (x) }"
    source = GraphFile.read(save(text, tmp_path / "m.onnx"))
    assert source.batch == BatchRange(4, 4, 4)
    assert source.size == ImageSize(8, 16)
    assert source.preprocessing.channels == 1


FOREIGN = {
    "two inputs": (
        "g (float[b,3,8,8] x, float[b,3,8,8] z) => (float[b,3,8,8] y) { y = Add (x, z) }",
        "takes 'x', 'z'; expected one image input",
    ),
    "no input": (
        "g () => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }",
        "takes none; expected one image input",
    ),
    "tokens": (
        "g (int64[b,3] x) => (int64[b,3] y) { y = Neg (x) }",
        "input 'x' is INT64[b,3]; expected float32 or float16 [b, c, h, w] or uint8 [b, h, w, "
        "c] images",
    ),
    "double": (
        "g (double[b,3,8,8] x) => (double[b,3,8,8] y) { y = Neg (x) }",
        "input 'x' is DOUBLE[b,3,8,8]; expected float32 or float16 [b, c, h, w] or uint8 "
        "[b, h, w, c] images",
    ),
    "uint8 planes": (
        "g (uint8[b,3,8,8] x) => (float[b,3,8,8] y) { y = Cast <to = 1> (x) }",
        "input 'x' is UINT8[b,3,8,8], which is uint8 [b, c, h, w]; uint8 images are taken as "
        "[b, h, w, c]: export it again with the Transpose inside, or with a float32 [b, c, h, w] "
        "input",
    ),
    "floats with the channels last": (
        "g (float[b,8,8,3] x) => (float[b,8,8,3] y) { y = Neg (x) }",
        "input 'x' is FLOAT[b,8,8,3], which is float [b, h, w, c]; float images are taken as "
        "[b, c, h, w]: export it again for that layout, or with a uint8 [b, h, w, c] input",
    ),
    "classes": (
        "g (float[b,3,8,8] x) => (int64[b,8,8] y) { y = ArgMax <axis = 1, keepdims = 0> (x) }",
        "output 'y' is int64[b,8,8]; a check compares floats of two axes or more, such as "
        "[b, classes] or [b, n, dim]; export the scores before argmax or squeeze",
    ),
    "one number an image": (
        "g (float[b,3,8,8] x) => (float[b] y) <int64[3] axes = {1, 2, 3}> "
        "{ y = ReduceMean <keepdims = 0> (x, axes) }",
        "output 'y' is float[b]; a check compares floats of two axes or more",
    ),
    "no numbers": (
        "g (float[b,3,8,8] x) => (float[b,3,8,0] y) <int64[1] start = {0}, int64[1] axis = {3}> "
        "{ y = Slice (x, start, start, axis) }",
        "output 'y' has the shape [b,3,8,0], which holds no numbers to compare; export it "
        "again with every size above 0",
    ),
    "dynamic": (
        "g (float[b,3,h,8] x) => (float[b,3,h,8] y) { y = Relu (x) }",
        "input 'x' is FLOAT[b,3,h,8]; height, width and channels must be fixed, batch alone may be "
        "dynamic; export it again for one image size",
    ),
}


@pytest.mark.parametrize(("text", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_not_understood_says_what_it_would_have_to_be(tmp_path, text, message) -> None:
    path = save(text, tmp_path / "m.onnx")
    with pytest.raises(GraphError) as raised:
        GraphFile.read(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("b,2,8,8", "pictures have no 2 channels; expected 1, 3 or 4"),
        ("b,1000000000,8,8", "pictures have no 1000000000 channels"),
        ("b,3,0,8", "image size 0x8 is out of range; expected 1 to 16384 pixels a side"),
        ("0,3,8,8", "batch range 0:0:0 is not ordered"),
    ],
)
def test_an_input_that_no_picture_fits_is_refused(tmp_path, shape, message) -> None:
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu (x) }}"
    with pytest.raises(GraphError) as raised:
        GraphFile.read(save(text, tmp_path / "m.onnx"))
    assert str(raised.value).startswith(f"{tmp_path / 'm.onnx'}: input 'x' is FLOAT[{shape}]; ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("domain", "hint"),
    [
        ("com.microsoft", "it was optimised by onnxruntime; export it again without"),
        ("my.plugins", "no TensorRT parser reads it; export it again from the checkpoint"),
    ],
)
def test_an_operator_that_no_parser_has_is_named(tmp_path, domain, hint) -> None:
    model = parse("g (float[b,3,8,8] x) => (float[b,3,8,8] y) { y = Relu (x) }")
    node = next(iter(model.graph))
    node.domain, node.op_type = domain, "BiasGelu"
    model.graph.opset_imports[domain] = 1
    path = tmp_path / "m.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(GraphError) as raised:
        GraphFile.read(path)
    assert str(raised.value) == f"{path}: node 'Relu0' is {domain}.BiasGelu: {hint}"


def test_preprocessing_that_the_manifest_lacks_is_the_default(ours, tmp_path) -> None:
    path = alone(ours / "m.onnx", tmp_path / "m.onnx", product="")
    written = manifest.read(ours / "m.onnx")
    assert written is not None
    size, digest = path.stat().st_size, manifest.sha256_of(path)
    bare = manifest.seal(replace(written, preprocessing=None, bytes=size, sha256=digest))
    manifest.manifest_path(path).write_text(bare)
    assert json.loads(bare)["preprocessing"] is None
    assert GraphFile.read(path).preprocessing == assumed(ImageSize(32, 32))
