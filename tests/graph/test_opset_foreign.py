"""ONNX files as other tools write them are taken by every command, or refused in one line."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import formats
import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from msn_export.artifact import GraphFile
from msn_export.cli import main
from msn_export.graph import io
from msn_export.graph.fuse import fuse_attention
from msn_export.spec import AttentionForm, Dtype, ImageSize, InputFormat
from tests.builders.checkpoints import randomised
from tests.builders.foreign import (
    IMAGES,
    OPTIMUM,
    QuantFormat,
    Reading,
    TimmLike,
    classifier,
    cls,
    encoder,
    exported,
    fused_by_onnxruntime,
    halved,
    quantised,
    quantised_dynamically,
    rewritten,
    scripted,
    shuffle,
    softmax_in_parts,
    softmax_of_rows,
)
from tests.builders.tiny_artifacts import pictures

Writer = Callable[[Path], Path]


def eager(path: Path, opset: int) -> Path:
    return scripted(path, Reading(encoder("eager"), cls), opset)


def interpolated(path: Path) -> Path:
    """Write a graph that resizes its position embedding for larger images at each run."""

    def read(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        return vectors[:, 0]

    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return scripted(path, Reading(encoder(), read), images=images)


def logits(path: Path, axes: dict[int, str]) -> Path:
    return scripted(path, Reading(classifier(), lambda m, x: m(x).logits), axes=axes)


@functools.cache
def by_torch(kind: str, opset: int) -> bytes:
    """Export once what several tests read: torch.export takes seconds."""
    models = {
        "timm": lambda: randomised(TimmLike()),
        "pool": lambda: randomised(TimmLike(pool=True)),
        "transformers": lambda: Reading(encoder(), cls),
    }
    with tempfile.TemporaryDirectory() as folder:
        return exported(Path(folder) / "m.onnx", models[kind](), opset).read_bytes()


def torch_export(path: Path, kind: str, opset: int) -> Path:
    path.write_bytes(by_torch(kind, opset))
    return path


def timm(path: Path, opset: int = 18) -> Path:
    return torch_export(path, "timm", opset)


def half(path: Path) -> Path:
    return scripted(path, Reading(encoder().half(), cls), images=IMAGES.half())


def blocked(path: Path) -> Path:
    source = torch_export(path, "transformers", 18)
    block = ["Softmax", "LayerNormalization", "Erf"]
    return halved(source, keep_io_types=True, op_block_list=block)


# what is read, by the row of FORMS that it is an example of
TAKEN: dict[str, tuple[Writer, ...]] = {
    "opset 11 and 12": (lambda path: eager(path, 11), lambda path: eager(path, 12)),
    "Softmax as Exp, ReduceSum and Div": (
        lambda path: rewritten(eager(path, 12), softmax_in_parts),
    ),
    "Softmax over [b * h * n, n]": (lambda path: rewritten(eager(path, 12), softmax_of_rows),),
    "keys transposed as [b * h, n, d]": (timm,),
    "opset 24 and later": (lambda path: timm(path, 24),),
    "nodes out of order": (lambda path: rewritten(eager(path, 17), shuffle),),
    "no value_info, or a wrong one": (lambda path: eager(path, 14), blocked),
    "shapes computed from the running batch": (
        lambda path: scripted(path, Reading(encoder(), cls)),
    ),
    "operators on constants (Resize)": (interpolated,),
    "height and width left open (optimum)": (lambda path: logits(path, OPTIMUM),),
    "float16 input": (half,),
    "fp16 by onnxconverter-common or onnxruntime.transformers": (
        lambda path: halved(timm(path), keep_io_types=True),
        lambda path: halved(eager(path, 17), keep_io_types=False),
    ),
    "softmax kept in fp32 (op_block_list)": (blocked,),
    "symmetric int8 Q/DQ of onnxruntime": (lambda path: quantised(eager(path, 17)),),
}
CASES = [
    pytest.param(writer, id=f"{name} {number}" if len(writers) > 1 else name)
    for name, writers in TAKEN.items()
    for number, writer in enumerate(writers)
]
# what is refused: the writer and what the one line says
REFUSED: dict[str, tuple[Writer, str]] = {
    "Q/DQ inside attention": (
        lambda path: quantised(eager(path, 17), attention=True),
        "are quantised, which no fused kernel takes",
    ),
    "asymmetric or uint8 Q/DQ": (
        lambda path: quantised(eager(path, 17), symmetric=False),
        "has a zero point other than 0, which TensorRT does not take; quantise symmetrically",
    ),
    "dynamic quantisation": (
        lambda path: quantised_dynamically(eager(path, 17)),
        "is DynamicQuantizeLinear: int8 without QuantizeLinear and DequantizeLinear, which no "
        "TensorRT parser reads; quantise the fp32 graph with msn-export calibrate",
    ),
    "QOperator quantisation": (
        lambda path: quantised(eager(path, 17), form=QuantFormat.QOperator),
        "no TensorRT parser reads; quantise the fp32 graph with msn-export calibrate",
    ),
    "attention-pooling head": (
        lambda path: torch_export(path, "pool", 20),
        "is learned, not computed from the image (an attention-pooling head), and no fused kernel "
        "is known for it; export the model without that head",
    ),
    "uint8 [b, c, h, w] input": (
        lambda path: scripted(
            path,
            Reading(encoder(), lambda m, x: cls(m, x.float() / 255)),
            images=IMAGES.to(torch.uint8),
        ),
        "which is uint8 [b, c, h, w]; uint8 images are taken as [b, h, w, c]",
    ),
    "float [b, h, w, c] input": (
        lambda path: scripted(
            path,
            Reading(encoder(), lambda m, x: cls(m, x.permute(0, 3, 1, 2))),
            images=IMAGES.permute(0, 2, 3, 1),
        ),
        "which is float [b, h, w, c]; float images are taken as [b, c, h, w]",
    ),
    "output of one axis, or of integers": (
        lambda path: scripted(path, Reading(classifier(), lambda m, x: m(x).logits.argmax(-1))),
        "output 'out' is int64[batch]; a check compares floats of two axes or more",
    ),
    "operators of onnxruntime (com.microsoft)": (
        lambda path: fused_by_onnxruntime(eager(path, 17)),
        "it was optimised by onnxruntime; export it again without",
    ),
}


def test_every_form_is_tested_as_what_it_is_listed_as() -> None:
    listed = {form.name: form.verdict for form in formats.FORMS}
    assert {name for name, verdict in listed.items() if verdict == "refused"} == REFUSED.keys()
    assert listed.keys() - REFUSED.keys() == TAKEN.keys()


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    dtype = np.float16 if taken.type == "tensor(float16)" else np.float32
    output: np.ndarray = session.run(None, {taken.name: images.astype(dtype)})[0]
    return output.astype(np.float64)


@pytest.mark.parametrize("writer", CASES)
def test_it_is_understood_fused_and_still_the_model(writer, tmp_path) -> None:
    path = writer(tmp_path / "theirs.onnx")
    source = GraphFile.read(path)
    assert source.notes[0].startswith(f"{path.name} has no manifest; ")
    assert fuse_attention(source.graph, AttentionForm.HEADS) == 2
    assert [node.op_type for node in source.graph.graph].count("Attention") == 2
    io.save(source.graph, tmp_path / "ours.onnx")
    size = source.size.height
    images = np.random.default_rng(0).standard_normal((3, 3, size, size))
    # fp16 rounds at 1e-3, and an int8 step that falls the other way is 1e-2 of the range
    allowed = {Dtype.FP32: 1e-5, Dtype.FP16: 5e-3, Dtype.INT8: 3e-2}[source.dtype]
    for count in (3, 1):
        wanted, got = (outputs(file, images[:count]) for file in (path, tmp_path / "ours.onnx"))
        assert np.linalg.norm(got - wanted) < allowed * np.linalg.norm(wanted)


def trt(path: Path, output: Path, *options: str) -> tuple[int, dict, str]:
    """Compile without a GPU; give the exit code, what was told, and the last line on stderr."""
    arguments = ["trt", str(path), "-o", str(output), "--json", "--backend", "tensorrt-rtx"]
    arguments += ["--compute-capability", "8.9", "--batch", "1:2:4", *options]
    result = CliRunner().invoke(main, arguments)
    told = json.loads(result.stdout) if result.exit_code == 0 else {}
    return result.exit_code, told, (result.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize(
    "name",
    [
        "opset 11 and 12",
        "keys transposed as [b * h, n, d]",
        "operators on constants (Resize)",
        "height and width left open (optimum)",
        "float16 input",
        "softmax kept in fp32 (op_block_list)",
        "symmetric int8 Q/DQ of onnxruntime",
    ],
)
def test_it_compiles_fused_and_in_half(name, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = TAKEN[name][0](tmp_path / "theirs.onnx")
    code, told, last = trt(path, tmp_path / "m.engine", "--fp16")
    assert code == 0, last
    assert (told["attention"]["expected"], told["engine"]["fused_attention"]) == (2, 2)
    quantised = told["dtype"] == "int8"
    assert set(told["engine"]["gemm_dtypes"]) <= ({"Int8", "Half"} if quantised else {"Half"})
    assert told["check"]["passed"] is True


@pytest.mark.parametrize(("writer", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_says_why_in_one_line_before_the_work(writer, message, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = writer(tmp_path / "theirs.onnx")
    code, _, last = trt(path, tmp_path / "m.engine")
    assert code == 1
    assert last.startswith(f"error: {path}: ")
    assert message in last
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.parametrize("name", ["Q/DQ inside attention", "attention-pooling head"])
def test_allow_unfused_compiles_what_its_message_offers_it_for(name, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = REFUSED[name][0](tmp_path / "theirs.onnx")
    _, _, last = trt(path, tmp_path / "m.engine")
    assert last.endswith("; --allow-unfused compiles them unfused")
    code, told, last = trt(path, tmp_path / "m.engine", "--allow-unfused")
    assert code == 0, last
    assert told["check"]["passed"] is True
    assert any(note.startswith("attention left as it is: ") for note in told["notes"])


def test_what_is_fp32_beside_8_bits_is_typed_and_told(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path = quantised(eager(tmp_path / "theirs.onnx", 17))
    code, told, last = trt(path, tmp_path / "m.engine")
    assert code == 0, last
    assert f"what {path.name} computes in fp32 beside int8 is fp16" in told["notes"]
    assert told["engine"]["fused_attention"] == 2


def test_a_softmax_that_was_kept_in_fp32_is_told(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    _, told, _ = trt(blocked(tmp_path / "theirs.onnx"), tmp_path / "m.engine")
    assert (
        "softmax of 2 attention cores was written in fp32 beside half precision; the fused "
        "operator computes it in its own precision"
    ) in told["notes"]


def test_a_size_that_was_dynamic_is_told(tmp_path) -> None:
    source = GraphFile.read(logits(tmp_path / "m.onnx", OPTIMUM))
    assert source.size == ImageSize(32, 32)
    assert source.notes[1] == (
        "its image size was dynamic, and is 32x32 as its position embedding has it"
    )


def test_a_float16_input_is_fed_halves(tmp_path) -> None:
    source = GraphFile.read(half(tmp_path / "m.onnx"))
    assert (source.input_format, source.dtype) == (InputFormat.HALF, Dtype.FP16)


def test_a_model_without_attention_is_refused(tmp_path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    path = exported(tmp_path / "cnn.onnx", layers)
    code, _, last = trt(path, tmp_path / "m.engine")
    assert code == 1
    assert last.startswith(
        f"error: {path}: the graph has no Softmax and no Attention; expected a vision transformer"
    )
    assert not (tmp_path / "m.engine").exists()


def test_a_compilers_own_reason_is_told_and_no_missing_driver(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    def read(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return cls(model, pixels.permute(0, 3, 1, 2).float() / 255)  # TensorRT moves no bytes

    images = IMAGES.permute(0, 2, 3, 1).to(torch.uint8)
    path = scripted(tmp_path / "theirs.onnx", Reading(encoder(), read), images=images)
    code, _, last = trt(path, tmp_path / "m.engine", "--fp16", "--no-check")
    assert code == 1
    assert "first input has type UInt8 but must have type Float" in last
    assert "driver" not in last


# --- every command --------------------------------------------------------------------------------


def all_at_once(path: Path) -> Path:
    """Opset 12, open axes, nodes out of order, nothing known of the values."""
    model = classifier()
    model.config._attn_implementation = "eager"
    reading = Reading(model, lambda m, x: m(x).logits)
    return rewritten(scripted(path, reading, 12, axes=OPTIMUM), shuffle)


@pytest.fixture(scope="module", params=[all_at_once, half], ids=["optimum, opset 12", "float16"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    pictures(folder / "pictures", 24)
    path: Path = request.param(folder / "theirs.onnx")
    return path


COMMANDS = {
    "validate": ["validate", "{model}", "{model}", "--json"],
    "drift": ["drift", "{model}", "{model}", "--json"],
    "inspect": ["inspect", "{model}", "--json"],
    "report": ["report", "{model}", "-o", "{out}/report.html"],
    "bench": ["bench", "{model}", "--batch", "1", "--rounds", "1", "--seconds", "0.1", "--json"],
    "embed": ["embed", "{model}", "{pictures}", "-o", "{out}/e.npy"],
    "triton": ["triton", "{model}", "-o", "{out}/triton", "--ensemble"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it(command, theirs, tmp_path) -> None:
    places = {"model": theirs, "out": tmp_path, "pictures": theirs.parent / "pictures"}
    arguments = [part.format(**places) for part in COMMANDS[command]]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    if command == "inspect":
        assert json.loads(result.stdout)["attention_expected"] == 2
