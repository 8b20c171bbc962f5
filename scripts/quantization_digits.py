"""A trained classifier in 8 bits: how many test images each choice of options gets right."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantization_bench import FORMS, Bench, Told, row, strength

from msn_export.runtime import open_runner
from tests.builders import digits

DIGITS: tuple[tuple[str, ...], ...] = (
    ("--observer", "max"),
    ("--observer", "percentile"),
    ("--observer", "entropy"),
    (),
    ("--bias-correction",),
    ("--quantize-attention",),
    ("--base", "fp32"),
)
NOT_FOR_FP8 = {"entropy", "fp32"}  # refused: no even steps, nothing that would multiply it


def digit_rows(bench: Bench) -> tuple[list[str], list[str], Told]:
    """Train, plant outliers, and count how many test images each graph gets right."""
    trained, planted, images = (bench.folder / name for name in ("digits", "planted", "pictures"))
    if not trained.is_dir():
        digits.train(trained)
        digits.plant(planted, trained)
        digits.plant(bench.folder / "sick", trained, [1])
        digits.load()[0].write(images, 200)
    heads = ("--head", "logits", "--head", "cls")
    bench.export("digits.onnx", str(trained), images, *heads)
    bench.export("digits.fp16.onnx", str(trained), images, *heads, "--dtype", "fp16")
    bench.export("planted.onnx", str(planted), images, *heads)
    rows = [row("fp32", "", *right(bench, "digits.onnx"), "", "")]
    rows.append(row("fp16", "", *right(bench, "digits.fp16.onnx"), "", ""))
    for form in FORMS:
        for options in DIGITS:
            if form == "fp8" and NOT_FOR_FP8 & set(options):
                continue
            rows.append(digit_row(bench, "digits", form, options))
    planted_rows = [row("fp32", "", *right(bench, "planted.onnx"), "", "")]
    for form in FORMS:
        for options in (
            ("--observer", "max", "--smooth", "off"), ("--observer", "max"), ("--smooth", "off"), (),
        ):  # fmt: skip
            planted_rows.append(digit_row(bench, "planted", form, options))
    bench.export("sick.onnx", str(bench.folder / "sick"), images, *heads)
    options = ("--observer", "max", "--smooth", "off", "--gate-cosine", "0.995", "--no-compile")
    sick = bench.calibrate("sick.int8.onnx", "sick.onnx", images, "--int8", *options)
    sick["right"] = right(bench, "sick.int8.onnx")[0]
    return rows, planted_rows, sick


def digit_row(bench: Bench, graph: str, form: str, options: Sequence[str]) -> str:
    """Quantise and count."""
    name = f"{graph}.{form}{''.join(options)}.onnx"
    asked = (f"--{form}", *options, "--gate-cosine", "0", "--no-compile")
    told = bench.calibrate(name, f"{graph}.onnx", bench.folder / "pictures", *asked)
    shown = f"`{' '.join(options)}`" if options else "defaults"
    return row(
        form, shown, *right(bench, name), f"{told['check']['cosine_p1']:.5f}", strength(told)
    )


def right(bench: Bench, name: str) -> tuple[str]:
    """Count the test images that are recognised, in percent."""
    test = digits.load()[1]
    planes = test.planes()
    with open_runner(bench.folder / name) as runner:
        logits = [runner(planes[at : at + 32])["logits"] for at in range(0, len(planes), 32)]
    share = (np.concatenate(logits).argmax(axis=1) == test.labels).mean()
    return (f"{share * 100:.2f} %",)
