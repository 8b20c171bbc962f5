"""Our own trace writes what torch.onnx.export writes, and refuses what it does not know."""

import copyreg
import logging
import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from msn_export.errors import GraphError
from msn_export.graph.torch_reference import ExportedModule, trace, translate
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.vit import VitMsn
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, Head, ImageSize, InputFormat
from tests.builders.checkpoints import hugging_face
from tests.builders.graphs import op_types

PREPROCESSING = preset("hf", ImageSize(32, 32))
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def torchs_own(model: VitMsn, heads: list[Head]) -> ir.Model:
    """The oracle: what torch.onnx.export makes of the same model."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch.export copies its own pytree specs through this module
        warnings.filterwarnings("ignore", category=FutureWarning, module=copyreg.__name__)
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        program = torch.onnx.export(
            ExportedModule(model, heads, InputFormat.FLOAT, PREPROCESSING).eval(),
            (torch.empty(2, 3, 32, 32),),
            dynamo=True,
            opset_version=23,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["pixel_values"],
            verbose=False,
        )
    assert program is not None
    return program.model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [[Head.CLS], [Head.LOGITS, Head.MEAN, Head.TOKENS]])
def test_torch_onnx_export_gives_the_same_outputs_from_the_same_operators(
    heads, attention, tmp_path
) -> None:
    hugging_face(tmp_path, labels=3)
    loaded = load_checkpoint(str(tmp_path)).model
    model = VitMsn(loaded.config, attention=attention).eval()
    model.load_state_dict(loaded.state_dict())
    ours = trace(
        model,
        heads=heads,
        input_format=InputFormat.FLOAT,
        batch=BatchRange(),
        preprocessing=PREPROCESSING,
    )
    theirs = torchs_own(model, heads)
    feeds = {"pixel_values": IMAGES}
    for ours_got, theirs_got in zip(run(ours, feeds), run(theirs, feeds), strict=True):
        np.testing.assert_allclose(ours_got, theirs_got, atol=5e-6)  # one rounding or two
    if attention == "sdpa":
        assert Counter(op_types(ours)) == Counter(op_types(theirs))


class Calls(nn.Module):
    """One function of an image batch."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(x),)


def translated(function: Any) -> ir.Model:
    module = Calls(function)
    batch = ir.SymbolicDim("batch")
    images = ir.Value(
        name="x", shape=ir.Shape((batch, 3, 4, 6)), type=ir.TensorType(ir.DataType.FLOAT)
    )
    return ir.Model(translate(fx.symbolic_trace(module).graph, module, images), ir_version=10)


FUNCTIONS = {
    "flatten the middle": lambda x: x.flatten(1, 2),
    "unflatten and swap": lambda x: x.unflatten(-1, (2, -1)).transpose(1, 3),
    "the second chunk": lambda x: x.chunk(2, dim=-2)[1],
    "a row and a range": lambda x: x[:, 1, 1:3],
    "a negative row": lambda x: x[:, -1],
    "a row of zeros in front": lambda x: F.pad(x, (0, 0, 1, 0)),
    "zeros around": lambda x: F.pad(x, (1, 2, 3, 4, 0, 1)),
    "averaged": lambda x: x.mean(dim=2),
    "sizes in arithmetic": lambda x: x * x.shape[-1] ** -0.5,
    "numbers on the left": lambda x: 1.0 - 2.0 * x,
    "divided": lambda x: x / 3.0,
    "product": lambda x: x @ x.transpose(-2, -1),
    "softmax in fp32": lambda x: x.softmax(dim=-1, dtype=torch.float32).to(x.dtype),
    "clamped": lambda x: x.clamp(-0.5, 0.25),
    "between 0 and 6": lambda x: F.relu6(5 * x),
    "leaky": lambda x: F.leaky_relu(x, negative_slope=0.2),
    "leaky as usual": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "normalized": lambda x: F.normalize(x, dim=-1),
    "zeros normalized": lambda x: F.normalize(x * 0.0, dim=3),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_call_computes_what_torch_does_and_knows_its_shape(function) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
    wanted = function(torch.from_numpy(x)).numpy()
    model = translated(function)
    np.testing.assert_allclose(run(model, {"x": x})[0], wanted, rtol=1e-6, atol=1e-6)
    shape = [2 if size == "batch" else size for size in model.graph.outputs[0].shape]
    assert shape == list(wanted.shape)


REFUSED = {
    "cumsum": (lambda x: x.cumsum(1), "the model calls cumsum, which has no ONNX form here"),
    "the batch in arithmetic": (lambda x: x * x.shape[0], "mul has no ONNX form here"),
    "the batch moved": (lambda x: x.permute(1, 0, 2, 3), "the batch must stay the first axis"),
    "the batch merged": (lambda x: x.flatten(0, 1), "the batch .* would become a constant"),
    "unequal chunks": (lambda x: x.chunk(4, dim=1), "3 rows are no 4 equal parts"),
    "sizes that differ": (lambda x: x + x[:, :2], "do not broadcast"),
    "an argument it does not know": (lambda x: x.mean(dim=1, keepdim=True), "keepdim"),
    "padding with a number": (lambda x: F.pad(x, (1, 0), value=1.0), "1.0 instead of zeros"),
    "another dtype": (lambda x: x.to(torch.int64), "to has no ONNX form here"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_form_is_named(function, message) -> None:
    with pytest.raises(GraphError, match=message):
        translated(function)


def test_a_module_without_a_form_is_named() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.pool(x),)

    module = Dropped()
    images = ir.Value(name="x", shape=ir.Shape((1, 3, 4, 6)))
    with pytest.raises(GraphError, match="the model calls AvgPool2d, which has no ONNX form"):
        translate(fx.symbolic_trace(module).graph, module, images)
