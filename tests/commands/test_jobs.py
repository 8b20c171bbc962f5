"""Any command's job refuses a field of another type as soon as it is made, naming what it takes."""

from pathlib import Path

import pytest

from msn_export.commands.bench import BenchJob
from msn_export.commands.calibrate import CalibrateJob
from msn_export.commands.drift import DriftJob
from msn_export.commands.embed import EmbedJob
from msn_export.commands.onnx import OnnxJob
from msn_export.commands.report import ReportJob
from msn_export.commands.triton import TritonJob
from msn_export.commands.trt import TrtJob
from msn_export.commands.validate import ValidateJob
from msn_export.errors import SpecError
from msn_export.spec import Dtype, Head

FILE = Path("m.onnx")
NAN = float("nan")
WRONG = [
    (OnnxJob, ("x", "m.onnx"), {}, "OnnxJob.output is 'm.onnx'; expected Path or None"),
    (OnnxJob, ("x",), {"dtype": "fp16"}, "OnnxJob.dtype is 'fp16'; expected Dtype"),
    (OnnxJob, ("x",), {"heads": ("cls",)}, "OnnxJob.heads is ('cls',); expected a tuple of Head"),
    (OnnxJob, ("x",), {"force": 1}, "OnnxJob.force is 1; expected bool"),
    (OnnxJob, (None,), {}, "OnnxJob.checkpoint is None; expected str"),
    (TrtJob, ("m.onnx",), {}, "TrtJob.model is 'm.onnx'; expected Path"),
    (TrtJob, (FILE,), {"workspace": True}, "TrtJob.workspace is True; expected int "
     "from 1 or None"),
    (CalibrateJob, (FILE, Dtype.INT8, "p"), {}, "CalibrateJob.images is 'p'; expected Path"),
    (ValidateJob, ("a", 3), {}, "ValidateJob.candidate is 3; expected str or Path"),
    (DriftJob, ("a", "b"), {"tolerance": -1.0}, "DriftJob.tolerance is -1.0; expected "
     "float from 0 or None"),
    (ValidateJob, ("a", "b"), {"numbers": {"cosine_min": "1"}}, "ValidateJob.numbers is "
     "{'cosine_min': '1'}; expected a mapping to float"),
    (DriftJob, ("a", "b"), {"limit": 0.5}, "DriftJob.limit is 0.5; expected int"),
    (ReportJob, ("a.onnx",), {}, "ReportJob.artifacts is 'a.onnx'; expected a tuple of str"),
    (BenchJob, ((FILE,),), {"batches": [1]}, "BenchJob.batches is [1]; expected a tuple of int"),
    (EmbedJob, (FILE, 3, FILE), {}, "EmbedJob.images is 3; expected Path or str"),
    (TritonJob, (FILE, FILE), {}, "TritonJob.artifacts is "),
    (BenchJob, ((),), {}, "a BenchJob takes at least one artifact and one batch size"),
    (BenchJob, ((FILE,),), {"batches": ()}, "a BenchJob takes at least one artifact and one batch"),
    (BenchJob, ((FILE,),), {"against": ("eagr",)}, "BenchJob.against is ('eagr',); expected a "
     "tuple of 'eager' or 'sdpa' or 'compile' or 'onnxruntime'"),
    (TritonJob, ((), FILE), {}, "a TritonJob takes at least one artifact"),
    # bounds, and words of a list
    (ValidateJob, ("a", "b"), {"limit": 0}, "ValidateJob.limit is 0; expected int from 1"),
    (DriftJob, ("a", "b"), {"batch": -1}, "DriftJob.batch is -1; expected int from 1"),
    (ReportJob, (("a",),), {"limit": 2}, "ReportJob.limit is 2; expected int from 3"),
    (BenchJob, ((FILE,),), {"rounds": 0}, "BenchJob.rounds is 0; expected int from 1"),
    (BenchJob, ((FILE,),), {"batches": (1, 0)}, "BenchJob.batches is (1, 0); expected a tuple of "
     "int from 1"),
    (EmbedJob, (FILE, "p", FILE), {"workers": 257}, "EmbedJob.workers is 257; expected int from 1 "
     "to 256 or None"),
    (TritonJob, ((FILE,), FILE), {"queue_delay": -1}, "TritonJob.queue_delay is -1; expected int "
     "from 0"),
    (TrtJob, (FILE,), {"optimization_level": 6}, "TrtJob.optimization_level is 6; expected int "
     "from 0 to 5 or None"),
    (TrtJob, (FILE,), {"timeout": NAN}, "TrtJob.timeout is nan; expected float from 1 or None"),
    (OnnxJob, ("x",), {"exif": "turn"}, "OnnxJob.exif is 'turn'; expected 'apply' or 'ignore' or "
     "None"),
    (OnnxJob, ("x",), {"dtype": Dtype.FP8}, "OnnxJob.dtype is fp8; a CalibrateJob quantises an "
     "fp32 graph"),
    (CalibrateJob, (FILE, Dtype.FP16, Path("p")), {}, "CalibrateJob.dtype is fp16; expected int8 "
     "or fp8"),
    (CalibrateJob, (FILE, Dtype.INT8, Path("p")), {"base": Dtype.INT8}, "CalibrateJob.base is "
     "int8; expected fp32 or fp16 or bf16"),
    (CalibrateJob, (FILE, Dtype.INT8, Path("p")), {"smooth": 1.5}, "CalibrateJob.smooth is 1.5; "
     "expected 'auto' or 'off' or float from 0 to 1 or None"),
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
