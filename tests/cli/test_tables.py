"""An artifact that was just written, as a person reads it, or a program."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msn_export.cli.console import Console
from msn_export.cli.tables import show_artifact, show_bench
from msn_export.reporting.describe import artifact_rows
from msn_export.spec import Dtype, Target
from tests.builders.benches import made_up
from tests.builders.manifests import check, engine, example


def test_every_row_says_what_the_manifest_says() -> None:
    assert list(artifact_rows(example())) == [
        ("file", "12.3 MB, sha256 abababababababab…"),
        ("checkpoint", "facebook/tiny@0123"),
        ("", "weights were float16"),
        ("input", "pixel_values: float [batch, 3, 32, 32]"),
        ("output", "logits: float [batch, 3]"),
        ("classes", "3, scores: softmax"),
        ("batch", "1:1:1, 2:4:8"),
        (
            "preprocessing",
            "msn-eval: short side to 37 (bilinear), centre 32x32, EXIF orientation applied",
        ),
        ("", "scale 1/255, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"),
        ("graph", "61 nodes, opset 23, fp16"),
        ("attention", "2 of 2 fused (kernel)"),
        ("fp32 islands", "2, up to 99999.5: blocks.0.Add, norm.bias"),
        ("engine", "tensorrt_rtx 1.7.1 for SM 8.9, 12.0"),
        ("kernels", "22 in all, 8 to 9 a block"),
        ("matrix products", "8 in Half"),
        ("fused attention", "2 kernels; sums: 1 in fp16, 1 in fp32"),
        ("executed", "no: compiled, not executed: no NVIDIA driver"),
        ("check", "16 images: photographs; batches 1, 4, 8"),
        ("", "against m.onnx in onnxruntime 1.31"),
        ("", "on onnxruntime 1.31"),
        ("max_abs", "1.25e-03 (mean 2.00e-04)"),
        ("cosine", "min 0.99991000, p1 0.99992000, median 0.99999000"),
        ("verdict", "passed on 16 images"),
        ("note", "skipped: a.png"),
    ]


def row(name: str, **changes: object) -> str:
    return dict(artifact_rows(example(**changes)))[name]


def test_noise_is_not_called_images() -> None:
    noise = check(source="seeded noise (no --images given)", images=4)
    assert row("check", check=noise).startswith("4 inputs: seeded noise (no --images given)")


def test_many_islands_are_counted_and_a_few_named() -> None:
    many = {f"blocks.{i}.Add": 2e4 + i for i in range(9)}
    assert row("fp32 islands", islands=many) == (
        "9, up to 20008: blocks.0.Add, blocks.1.Add, blocks.2.Add, blocks.3.Add, blocks.4.Add, "
        "blocks.5.Add and 3 more in the manifest"
    )
    assert row("fp32 islands", islands={"gain": None}) == "1: gain"


def test_what_was_not_checked_or_has_no_engine_says_so() -> None:
    assert row("check", check=None) == "none (--no-check)"
    names = [name for name, _ in artifact_rows(example(engine=None, islands={}, checkpoint=None))]
    assert not {"engine", "executed", "fp32 islands", "checkpoint"} & set(names)


def test_a_figure_that_is_none_is_called_so() -> None:
    broken = check(max_abs=None, cosine_min=None, passed=False)
    assert row("max_abs", check=broken) == "not a number (mean 2.00e-04)"
    assert row("cosine", check=broken).startswith("min not a number, p1 0.9")
    assert row("verdict", check=broken) == "FAILED on 16 images"


@pytest.mark.parametrize(
    ("blocks", "shown"), [({"0": 9, "1": 9}, "22 in all, 9 a block"), ({}, "22 in all, ? a block")]
)
def test_kernels_a_block_are_a_number_a_span_or_unknown(blocks, shown) -> None:
    assert row("kernels", engine=engine(kernels_per_block=blocks)) == shown


def test_the_table_shows_names_as_they_are(capsys) -> None:
    # a path or a label that looks like rich's markup is text all the same
    hostile = example(notes=("skipped: [/bold] [red].png",))
    show_artifact(Console(as_json=False), Path("out[/x].engine"), hostile)
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "out[/x].engine"
    assert "skipped: [/bold] [red].png" in out


def test_json_is_the_manifest_with_the_path_that_was_written(capsys) -> None:
    show_artifact(Console(as_json=True), Path("deep/m.engine"), example())
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == "deep/m.engine"
    assert told["engine"]["gemm_dtypes"] == {"Half": 8}
    assert told["labels"] == ["cat", "dög", "[bird]"]


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"engine": None}, "msn-export trt 'my out.onnx' --images PICTURES"),
        (
            {"engine": None, "dtype": Dtype.FP32},
            "msn-export trt 'my out.onnx' --fp16 --images PICTURES",
        ),
        ({"engine": None, "target": Target.ONNXRUNTIME}, "msn-export bench 'my out.onnx'"),
        ({}, "msn-export bench 'my out.onnx', on its GPU"),
    ],
)
def test_the_last_row_is_the_command_that_comes_next(capsys, changes, command) -> None:
    show_artifact(Console(as_json=False), Path("my out.onnx"), example(**changes))
    *_, took, last, _ = capsys.readouterr().out.splitlines()
    assert command in last
    assert "took" in took
    assert " s, peak memory 2.00 GB" in took


@pytest.mark.parametrize(("passed", "code"), [(True, "\x1b[32mpassed"), (False, ";41mFAILED")])
def test_a_verdict_stands_out_in_colour_and_in_letters(capsys, monkeypatch, passed, code) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_artifact(Console(as_json=False), Path("m.onnx"), example(check=check(passed=passed)))
    assert code in capsys.readouterr().out


def test_a_benchmark_that_is_too_noisy_says_so_before_all_else_below_its_tables(capsys) -> None:
    first, *rest = made_up().timings
    noisy = made_up(timings=(replace(first, noisy="quartiles of the ratio are 0.7 and 1.1"), *rest))
    for bench, expected in ((noisy, True), (made_up(), False)):
        show_bench(Console(as_json=False), bench)
        _, _, below = capsys.readouterr().out.rpartition("model.onnx")
        lines = [line for line in below.splitlines() if line and line[0].isalpha()]
        assert lines[0].startswith("Too noisy, run again on an idle machine: eager") is expected
    show_bench(Console(as_json=True), noisy)
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert timings[0]["noisy"] == "quartiles of the ratio are 0.7 and 1.1"
    assert [len(calls) for calls in timings[0]["samples_ms"]] == [5] * 10
    assert timings[1]["noisy"] is None


LONG = (
    "facebook-vit-msn-base-flowers102.onnx (ort)",
    "facebook-vit-msn-base-flowers102.int8.onnx (ort)",
    "facebook-vit-msn-base-flowers102.onnx (ov)",
    "facebook-vit-msn-base-flowers102.int8.onnx (ov)",
)


@pytest.mark.parametrize("columns", ["80", "100", "160", "30", None])
def test_every_figure_of_a_benchmark_is_whole_at_any_width(capsys, monkeypatch, columns) -> None:
    if columns is None:  # a pipe
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    bench = made_up(names=LONG, load=1.5, preset="paper")
    show_bench(Console(as_json=False), bench)
    out = capsys.readouterr().out
    assert "…" not in out
    tables = out[: out.index("Too noisy")]
    for timing in bench.timings:
        ratio = timing.ratio
        assert f"{timing.images_per_second:.1f}" in tables
        assert f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f}) *" in tables
    assert tables.count("1.000000  1.0e-06") == len(bench.timings)
    words = ("median ms", "p90", "p99", "images/s", "ratio", "cosine", "max_abs", "opened")
    assert all(word in tables for word in words)
    if columns in {"160", None}:  # there is room for each name
        assert all(tables.count(name) >= 3 for name in LONG)
        assert "batch  contender" in tables
    if columns in {"80", "100", "160"}:
        above, _, _ = out.partition("median time of a call")  # which has a column a contender
        above = above.rpartition("\n")[0]
        assert max(map(len, above.splitlines())) <= int(columns)
    rows = [line for line in tables.splitlines() if line.strip()[:1] in {"1", "8"}]
    assert len(rows) >= len(bench.timings)  # each row begins with its batch


def test_the_basis_of_the_ratios_is_said_under_the_table(capsys) -> None:
    show_bench(Console(as_json=False), made_up())
    told = " ".join(capsys.readouterr().out.split())
    assert "time / eager" not in told[: told.index("ratio: ")]
    assert (
        "ratio: time / eager, median over 10 rounds of the ratio within a round (quartiles). "
        "Quartiles show the spread within this run, not between runs." in told
    )


def test_a_batch_that_is_run_in_pieces_says_so_in_its_row(capsys, monkeypatch) -> None:
    first, *rest = made_up().timings
    split = made_up(timings=(replace(first, split="in pieces of 32"), *rest))
    monkeypatch.setenv("COLUMNS", "120")
    show_bench(Console(as_json=False), split)
    assert capsys.readouterr().out.count(" 1  eager, in pieces of 32 ") == 1
