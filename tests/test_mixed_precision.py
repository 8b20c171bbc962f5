"""A choice of precision is carried out on the graph, and what came of it runs on the CPU."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.metrics.evaluate import Sample, draw
from msn_export.mixed_precision import Fp32Islands, convert, cpu_runner
from msn_export.preprocessing import preset
from msn_export.spec import Dtype, ImageSize, InputFormat
from tests.builders.graphs import parse

# bytes times 1000 pass 65504 on most images; weights stay small
TEXT = """
g (uint8[b,2,2,1] images) => (float[b,4] y)
<float k = {1000.0}, float tiny = {0.001}, int64[2] shape = {-1, 4}>
{
    x = Cast <to = 1> (images)
    large = Mul (x, k)
    small = Mul (large, tiny)
    y = Reshape (small, shape)
}
"""


@pytest.fixture
def sample() -> Sample:
    return draw(None, preset("hf", ImageSize(2, 2), 1))


def typed(choice: str, sample: Sample, tmp_path, dtype: Dtype = Dtype.FP16):
    model = parse(TEXT)
    return model, convert(model, dtype, choice, sample, InputFormat.UINT8, tmp_path)


def test_what_overflows_on_the_images_stays_fp32_and_is_told_with_its_maximum(
    sample, tmp_path
) -> None:
    model, islands = typed("measured", sample, tmp_path)
    largest = float(sample.pixels.max()) * 1000
    assert islands.maxima == {"large": largest}
    assert set(islands.nodes) == {"Mul1", "Mul2"}
    assert value(model, "large").dtype == ir.DataType.FLOAT
    assert list(tmp_path.iterdir()) == []


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def test_nothing_stays_where_nothing_is_asked(sample, tmp_path) -> None:
    model, islands = typed("none", sample, tmp_path)
    assert islands == Fp32Islands({})
    assert value(model, "large").dtype == ir.DataType.FLOAT16


def test_bf16_needs_no_island(sample, tmp_path) -> None:
    model, islands = typed("measured", sample, tmp_path, Dtype.BF16)
    assert islands == Fp32Islands({})
    assert value(model, "large").dtype == ir.DataType.BFLOAT16


def test_a_file_names_them(sample, tmp_path) -> None:
    (tmp_path / "islands.json").write_text(json.dumps({"small": 12}))
    model, islands = typed(str(tmp_path / "islands.json"), sample, tmp_path)
    assert islands.maxima == {"small": 12.0}
    assert value(model, "small").dtype == ir.DataType.FLOAT


def test_a_weight_that_overflows_by_itself_is_told_with_its_own_maximum(sample, tmp_path) -> None:
    model = parse(TEXT.replace("{1000.0}", "{-119111.0}"))
    islands = convert(model, Dtype.FP16, "none", sample, InputFormat.UINT8, tmp_path)
    assert islands.maxima == {"k": 119111.0}


def test_what_was_named_and_not_measured_has_infinity(sample, tmp_path) -> None:
    (tmp_path / "islands.json").write_text('{"small": null}')  # as older manifests have weights
    _, islands = typed(str(tmp_path / "islands.json"), sample, tmp_path)
    assert islands.maxima == {"small": math.inf}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give another file"),
        ("{", "is not JSON (Expecting property name"),
        ("[]", "is not a JSON object of tensor name to largest value; take the 'islands' of a"),
        ('{"large": "big"}', "is not a JSON object of tensor name to largest value"),
        ('{"large": true}', "is not a JSON object of tensor name to largest value"),
    ],
)
def test_a_file_that_does_not_is_refused(sample, tmp_path, content, message) -> None:
    path = tmp_path / "islands.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GraphError) as raised:
        typed(str(path), sample, tmp_path)
    assert str(raised.value).startswith(f"islands file {path} {message}")


def test_an_island_of_another_graph_is_named(sample, tmp_path) -> None:
    (tmp_path / "islands.json").write_text('{"blocks.7.Add": 1e5}')
    with pytest.raises(GraphError, match=r"island 'blocks\.7\.Add' is no value of this graph"):
        typed(str(tmp_path / "islands.json"), sample, tmp_path)


@pytest.mark.parametrize(("dtype", "bits"), [(Dtype.FP32, 24), (Dtype.FP16, 11), (Dtype.BF16, 8)])
def test_every_dtype_runs_here_as_precisely_as_it_is(sample, tmp_path, dtype, bits) -> None:
    model = parse(TEXT.replace("{1000.0}", "{0.3}"))
    if dtype is not Dtype.FP32:
        convert(model, dtype, "none", sample, InputFormat.UINT8, tmp_path)
    io.save(model, tmp_path / "m.onnx")
    runner = cpu_runner(tmp_path / "m.onnx", dtype, tmp_path)
    got = runner(sample.pixels)["y"]
    wanted = sample.pixels.reshape(4, 4).astype(np.float64) * 0.3 * 0.001
    error = np.abs(got / np.where(wanted == 0, 1, wanted) - (wanted != 0)).max()
    assert error <= 4 * 2.0**-bits  # four roundings of half a unit each, and the constants'
    assert error > 2.0 ** -(bits + 4)
    assert ("bf16 emulated" in runner.name) == (dtype is Dtype.BF16)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_broken_graph_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"m\.onnx is not an ONNX file"):
        cpu_runner(tmp_path / "m.onnx", Dtype.FP32, tmp_path)
