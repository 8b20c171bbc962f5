"""TensorRT-RTX's own parser and builder, without any of our code, build what the table says."""

import clients
import pytest
from clients import CLIENTS, ClientError

from msn_export.manifest import read
from msn_export.spec import Dtype, Target
from msn_export.version_table import Client, table
from tests.builders.engine_builds import NEEDS_RTX
from tests.clients.test_portable import inputs

pytestmark = NEEDS_RTX

HEADS = ("--head", "cls", "--head", "logits", "--no-check")
RTX = CLIENTS["tensorrt-rtx"]
UNFUSED = "Attention operation was not supported by a dedicated kernel"
FORMS = [(target, dtype) for target in Target for dtype in (Dtype.FP32, Dtype.FP16)]


def build(export, target: Target, dtype: Dtype) -> None:
    path = export("--target", target.value, "--dtype", dtype.value, *HEADS)
    assert clients.run(RTX, None, path, *inputs(path)) == {}  # compiled, not executed


@pytest.mark.parametrize(("target", "dtype"), FORMS)
def test_a_bare_builder_builds_what_the_table_says(export, target, dtype) -> None:
    if table()[target][dtype][Client.TENSORRT_RTX].least is not None:
        build(export, target, dtype)
        return
    with pytest.raises(ClientError, match=UNFUSED):
        build(export, target, dtype)


def test_fp32_attention_is_what_it_does_not_build() -> None:
    without = {
        (target, dtype)
        for target, rows in table().items()
        for dtype, row in rows.items()
        if row[Client.TENSORRT_RTX].least is None
    }
    assert without == {
        (Target.TENSORRT, Dtype.FP32),
        (Target.ONNXRUNTIME, Dtype.FP32),
        (Target.ONNXRUNTIME, Dtype.INT8),  # the rest of it is fp32
        (Target.ONNXRUNTIME, Dtype.FP8),
    }


def test_the_export_says_so_of_a_graph_for_tensorrt_alone(export) -> None:
    def notes(target: str, dtype: str) -> str:
        manifest = read(export("--target", target, "--dtype", dtype, *HEADS))
        assert manifest is not None
        return " ".join(manifest.notes)

    said = notes("tensorrt", "fp32")
    assert "TensorRT's parser and builder alone do not build this fp32 graph" in said
    assert "msn-export trt builds it; for other builders take --target portable" in said
    others = (("tensorrt", "fp16"), ("onnxruntime", "fp32"), ("portable", "fp32"))
    assert not any("do not build" in notes(*one) for one in others)
