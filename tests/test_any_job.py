"""Any command's job refuses a field of another type as soon as it is made, naming what it takes."""

from pathlib import Path

import pytest

from msn_export.errors import SpecError
from msn_export.run_bench import BenchJob
from msn_export.run_calibrate import CalibrateJob
from msn_export.run_drift import DriftJob
from msn_export.run_embed import EmbedJob
from msn_export.run_onnx import OnnxJob
from msn_export.run_report import ReportJob
from msn_export.run_triton import TritonJob
from msn_export.run_trt import TrtJob
from msn_export.run_validate import ValidateJob
from msn_export.spec import Dtype, Head

FILE = Path("m.onnx")
WRONG = [
    (OnnxJob, ("x", "m.onnx"), {}, "OnnxJob.output is 'm.onnx'; expected Path or None"),
    (OnnxJob, ("x",), {"dtype": "fp16"}, "OnnxJob.dtype is 'fp16'; expected Dtype"),
    (OnnxJob, ("x",), {"heads": ("cls",)}, "OnnxJob.heads is ('cls',); expected a tuple of Head"),
    (OnnxJob, ("x",), {"force": 1}, "OnnxJob.force is 1; expected bool"),
    (OnnxJob, (None,), {}, "OnnxJob.checkpoint is None; expected str"),
    (TrtJob, ("m.onnx",), {}, "TrtJob.model is 'm.onnx'; expected Path"),
    (TrtJob, (FILE,), {"workspace": True}, "TrtJob.workspace is True; expected int or None"),
    (CalibrateJob, (FILE, Dtype.INT8, "p"), {}, "CalibrateJob.images is 'p'; expected Path"),
    (CalibrateJob, (FILE, Dtype.INT8, Path("p")), {"smooth": ()}, "CalibrateJob.smooth is (); "
     "expected str or float or None"),
    (ValidateJob, ("a", FILE), {}, "ValidateJob.candidate is "),
    (ValidateJob, ("a", "b"), {"numbers": {"cosine_min": "1"}}, "ValidateJob.numbers is "
     "{'cosine_min': '1'}; expected a mapping to float"),
    (DriftJob, ("a", "b"), {"limit": 0.5}, "DriftJob.limit is 0.5; expected int"),
    (ReportJob, ("a.onnx",), {}, "ReportJob.artifacts is 'a.onnx'; expected a tuple of str"),
    (BenchJob, ((FILE,),), {"batches": [1]}, "BenchJob.batches is [1]; expected a tuple of int"),
    (EmbedJob, (FILE, 3, FILE), {}, "EmbedJob.images is 3; expected Path or str"),
    (TritonJob, (FILE, FILE), {}, "TritonJob.artifacts is "),
]  # fmt: skip


@pytest.mark.parametrize(("job", "given", "options", "message"), WRONG)
def test_a_field_of_another_type_is_named_with_what_it_takes(job, given, options, message) -> None:
    with pytest.raises(SpecError) as raised:
        job(*given, **options)
    assert str(raised.value).startswith(message)


def test_what_is_declared_is_taken() -> None:
    assert OnnxJob("x", FILE, heads=(Head.CLS, Head.MEAN)).output == FILE
    assert TrtJob(FILE, timeout=3).timeout == 3  # an int is a float, as to a type checker
    for smooth in ("auto", 0.5, None):
        assert CalibrateJob(FILE, Dtype.FP8, Path("p"), smooth=smooth).smooth == smooth
    assert EmbedJob(FILE, "s3://b/f", FILE).images == "s3://b/f"
