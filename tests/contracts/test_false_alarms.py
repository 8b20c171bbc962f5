"""No false alarm: what is sound passes every gate, in every form and precision.

A model has the patch, the head size and the number of tokens of a published shape, and few heads
and blocks; or it is the published shape itself. The grid takes hours (``-m slow``); a part of it,
drawn by a seed, runs each time.
"""

import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.trt import TrtJob, run_trt
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.errors import ToleranceError
from msn_export.models.config import VARIANTS
from msn_export.models.vit import VitMsn
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Head, InputFormat, Target
from tests.builders.engine_builds import NEEDS_RTX

SEED, DRAWN = 0, 3
BATCH = BatchRange(1, 1, 2)
SM_89 = ComputeCapability(8, 9)
LABELS = ("cat", "dog", "fish")
# Tiny models by the published shape whose patch, head size and tokens they have. From 4 heads on
# the last block computes [CLS] alone where nothing else is asked for.
HEADS = {"small": 4, "base": 5, "large": 6, "base-4": 4, "large-7": 4}
# What training does to weights: gains far apart, one token or every token with one massive channel
# (balanced: with gains and biases that keep the others' size), outputs that share a large vector,
# attention on single tokens.
TRAINED = (
    "gains",
    *(f"massive {value}" for value in (50, 300, 3000, 12000)),
    *(f"channel {value}" for value in (50, 300, 3000, 12000)),
    *(f"balanced {value}" for value in (300, 3000, 12000)),
    *(f"mean {norm}" for norm in (10, 30)),
    *(f"sharp {factor}" for factor in (5, 20, 30, 100)),
)
# With nothing that brings the other channels' size back, what tells these images apart is less than
# a precision keeps of the output: refusing them is right.
LOST = {
    "channel 300": (Dtype.FP8,),
    **dict.fromkeys(
        ("channel 3000", "channel 12000"), tuple(d for d in Dtype if d is not Dtype.FP32)
    ),
}
Form = tuple[Target, InputFormat, Head]
FORMS: tuple[Form, ...] = (
    (Target.TENSORRT, InputFormat.FLOAT, Head.CLS),
    (Target.ONNXRUNTIME, InputFormat.UINT8, Head.TOKENS),
    (Target.PORTABLE, InputFormat.FLOAT, Head.LOGITS),
)


@dataclass(frozen=True)
class Case:
    """One graph of one model; ``shape`` with vit-msn- before it is the published one in full."""

    shape: str
    dtype: Dtype
    target: Target = Target.TENSORRT
    input_format: InputFormat = InputFormat.FLOAT
    head: Head = Head.CLS
    trained: str = ""

    def __str__(self) -> str:
        parts = (self.shape, self.trained, self.target, self.input_format, self.head, self.dtype)
        return "-".join(part.replace(" ", "-") for part in parts if part)


def grid() -> list[Case]:
    """Give every case; those of published shapes in full come last."""
    inputs = (InputFormat.FLOAT, InputFormat.UINT8)
    cases = [
        *(Case("small", *form) for form in product(Dtype, Target, inputs, Head)),
        *(Case("large-7", *form)
          for form in product(Dtype, Target, inputs, (Head.CLS, Head.TOKENS))),
        # base and large have small's patch, head size and tokens
        *(Case(shape, dtype) for shape, dtype in product(("base", "large"), Dtype)),
        *(Case("base-4", dtype, *form) for form, dtype in product(FORMS, Dtype)),
        *(Case("small", dtype, *form, trained)
          for trained, form, dtype in product(TRAINED, FORMS, Dtype)),
        *(Case("vit-msn-small", dtype, target) for target, dtype in product(Target, Dtype)),
        *(Case(f"vit-msn-{shape}", dtype) for shape in list(HEADS)[1:] for dtype in Dtype),
    ]  # fmt: skip
    # opset 17 has no bf16 convolution and no fp8; packed attention computes queries inside
    absent = {
        *((Target.PORTABLE, dtype, head) for dtype in (Dtype.BF16, Dtype.FP8) for head in Head),
        *((Target.ONNXRUNTIME, dtype, Head.ATTENTION) for dtype in Dtype),
    }
    return [case for case in cases if (case.target, case.dtype, case.head) not in absent]


def engines() -> list[tuple[Case, Dtype]]:
    """Give graphs with the precision that an engine is made in."""
    typed = (Dtype.FP32, Dtype.FP16, Dtype.BF16)
    tiny = [Case(shape, Dtype.FP32) for shape in HEADS]
    trained = [Case("small", Dtype.FP32, trained=kind) for kind in TRAINED]
    return [
        *product([*tiny, *trained], typed),
        *((Case(shape, Dtype.FP32, head=Head.TOKENS), Dtype.FP16) for shape in HEADS),
        *((Case("small", dtype), dtype) for dtype in Dtype if dtype is not Dtype.FP32),
    ]


def drawn() -> list[Case]:
    """Draw a few cases of 197 tokens, and give those that failed once."""
    few = [case for case in grid() if case.shape in {"small", "base", "large"}]
    failed = [
        # one row is multiplied in another order than many; a few logits are rounded well by chance
        Case("small", Dtype.FP32, Target.PORTABLE, head=Head.LOGITS, trained="massive 12000"),
        Case("small", Dtype.FP32, Target.PORTABLE, head=Head.LOGITS, trained="channel 300"),
        # an error that all embeddings share leaves them apart
        Case("small", Dtype.BF16, trained="channel 300"),
    ]
    return failed + random.Random(SEED).sample(few, DRAWN)  # noqa: S311


def made(case: Case) -> VitMsn:
    """Draw a tiny model whose products keep the size of what they are given, then change it."""
    shape = VARIANTS[f"vit-msn-{case.shape}"]
    heads = HEADS[case.shape]
    dim = heads * shape.dim // shape.heads
    model = VitMsn(
        replace(shape, dim=dim, heads=heads, mlp_dim=4 * dim, depth=2, labels=LABELS)
    ).requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    kind, _, text = case.trained.partition(" ")
    number = float(text or 0)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim in {2, 4} else dim
        torch.nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
            if kind == "gains":
                parameter.log_normal_(0, 1, generator=generator)
        if name in {"cls_token", "pos_embed"}:
            parameter.mul_(dim**0.5)
        if kind == "sharp" and "qkv" in name:
            parameter[: 2 * dim].mul_(number)
    if kind == "mean":
        model.norm.bias.add_(number / dim**0.5)
    if kind == "massive":  # one token, as in trained ViTs (arXiv 2309.16588)
        model.pos_embed[0, 3, 5] += number
    if kind in {"channel", "balanced"}:
        model.pos_embed[0, :, 5] += number
    if kind == "balanced":
        others = torch.arange(dim) != 5
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight[5] /= number
            norm.bias[others] += norm.weight[others] * number / dim
            norm.weight *= number / dim**0.5
    return model


class Models:
    """Checkpoints and graphs, each made once."""

    def __init__(self, folder: Path, photographs: Path) -> None:
        self.folder = folder
        self._few, self._more = (self._smaller(photographs, count) for count in (4, 8))
        self.parts = self._parts(photographs)

    def _parts(self, photographs: Path) -> Path:
        """Cut three corners of each photograph: more pictures than run in fp64."""
        folder = self.folder / "parts"
        folder.mkdir()
        for path in sorted(photographs.iterdir()):
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            x, y = picture.width // 2, picture.height // 2
            for left, top in ((0, 0), (x, 0), (0, y)):
                part = picture.crop((left, top, left + x, top + y)).resize((224, 224))
                part.save(folder / f"{path.stem}-{left}-{top}.png")
        return folder

    def _smaller(self, photographs: Path, count: int) -> Path:
        folder = self.folder / f"photographs-{count}"
        folder.mkdir()
        for path in sorted(photographs.iterdir())[:count]:
            with Image.open(path) as opened:
                small = opened.convert("RGB").resize((224, 224))
            small.save(folder / f"{path.stem}.png")
        return folder

    def images(self, case: Case) -> Path:
        """Give the pictures that a case is calibrated and compared on.

        Ranges need 8: on 3 of 4 those of gains far apart err 2.1 times those of all four. The two
        largest shapes in full have 4, which bound no ranges.
        """
        long = case.shape in {"vit-msn-base-4", "vit-msn-large-7"}
        return self._more if case.dtype.is_quantised and not long else self._few

    def checkpoint(self, case: Case) -> str:
        if case.shape.startswith("vit-msn-"):
            return f"random:{case.shape}:0"
        folder = self.folder / f"{case.shape}-{case.trained}".replace(" ", "-")
        if not folder.exists():
            model = made(case)
            folder.mkdir()
            save_file(model.state_dict(), folder / "model.safetensors")
            config = model.config
            settings = {
                "model_type": "vit_msn", "hidden_size": config.dim, "image_size": 224,
                "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
                "intermediate_size": config.mlp_dim, "patch_size": config.patch_size[0],
                "id2label": dict(enumerate(LABELS)),
            }  # fmt: skip
            (folder / "config.json").write_text(json.dumps(settings))
        return str(folder)

    def graph(self, case: Case) -> Path:
        output = self.folder / f"{case}.onnx"
        if output.exists():
            return output
        if case.dtype.is_quantised:
            source = self.graph(replace(case, dtype=Dtype.FP32))
            # what is refused for what 8 bits cost a trained model is no question here
            gate = 0.9 if case.trained else None
            asked = CalibrateJob(
                source, case.dtype, self.images(case), output, compile=False, gate_cosine=gate
            )
            return run_calibrate(asked)[0]
        job = OnnxJob(
            self.checkpoint(case), output, heads=(case.head,), input_format=case.input_format,
            dtype=case.dtype, target=case.target, images=self.images(case), batch=BATCH,
        )  # fmt: skip
        return run_onnx(job)[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Models:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Models(tmp_path_factory.mktemp("alarms"), photographs)
    torch.set_num_threads(threads)


def expected(trained: str, dtype: Dtype) -> AbstractContextManager[object]:
    """Expect a refusal where the model has nothing left in a precision."""
    if dtype in LOST.get(trained, ()):
        return pytest.raises(ToleranceError, match="it does not tell them apart")
    return nullcontext()


def require_passes(case: Case, models: Models) -> None:
    with expected(case.trained, case.dtype):
        graph = models.graph(case)
        references = [models.checkpoint(case)]
        if case.dtype is not Dtype.FP32:
            references.append(str(models.graph(replace(case, dtype=Dtype.FP32))))
        for reference in references:
            asked = ValidateJob(reference, str(graph), images=models.images(case))
            validation = run_validate(asked)
            assert validation.passed, (reference, validation.reasons)


@pytest.mark.parametrize("case", drawn(), ids=str)
def test_what_is_sound_passes_a_part_of_the_grid(case, models) -> None:
    require_passes(case, models)


# One failed once: the pictures behind the sixteenth are compared with fp32, and some of them
# round worse than those that are in fp64.
FAILED_ONCE = Case("small", Dtype.FP32, *FORMS[1], "sharp 100")
IN_FP32 = [Case("small", Dtype.FP32, *form, kind) for kind in TRAINED for form in FORMS]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == FAILED_ONCE else pytest.mark.slow) for case in IN_FP32],
    ids=str,
)
def test_more_pictures_than_run_in_fp64_pass(case, models) -> None:
    asked = ValidateJob(models.checkpoint(case), str(models.graph(case)), images=models.parts)
    validation = run_validate(asked)
    assert (validation.check.images, validation.reasons) == (48, ())


@pytest.mark.slow
@pytest.mark.parametrize("case", grid(), ids=str)
def test_what_is_sound_passes(case, models) -> None:
    require_passes(case, models)


@pytest.mark.slow
@NEEDS_RTX
@pytest.mark.parametrize(("case", "dtype"), engines(), ids=str)
def test_a_sound_engine_is_compiled(case, dtype, models) -> None:
    output = models.folder / f"{case}-{dtype}.engine"
    graph = models.graph(case)
    job = TrtJob(graph, output, dtype, "tensorrt-rtx", (SM_89,), images=models.images(case))
    with expected(case.trained, dtype):
        assert run_trt(job)[1].check.passed
