"""The options of ``msn-export fit`` are its own and those of ``onnx``."""

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.commands.fit_job import FitJob
from msn_export.commands.jobs import OnnxJob
from msn_export.errors import OutputError, SpecError
from msn_export.options import opts_of
from msn_export.spec import BatchRange, Dtype, Head, Target

LABELLED = Path("digits")


def test_the_options_of_onnx_are_there_but_the_names_of_classes() -> None:
    assert set(opts_of(OnnxJob)) - set(opts_of(FitJob)) == {"labels"}
    assert {"features", "shots", "draws", "seed", "C", "test"} <= set(opts_of(FitJob))


def test_what_is_exported_is_what_was_asked_for() -> None:
    job = FitJob(
        "random:vit-msn-small", Path("m.onnx"), labelled=LABELLED, dtype=Dtype.FP16,
        batch=BatchRange(1, 2, 3), shots=5, normalize=True,
    )  # fmt: skip
    exported = job.onnx_job(heads=(Head.LOGITS,), output=Path("n.onnx"))
    assert type(exported) is OnnxJob
    assert (exported.dtype, exported.batch, exported.normalize) == (
        Dtype.FP16, BatchRange(1, 2, 3), True,
    )  # fmt: skip
    assert (exported.heads, exported.output) == ((Head.LOGITS,), Path("n.onnx"))
    same = [one.name for one in fields(OnnxJob) if one.name not in {"heads", "output"}]
    assert all(getattr(exported, name) == getattr(job, name) for name in same)


WRONG = [
    ({"labels": Path("x")}, "FitJob.labels is PosixPath('x'); expected None"),
    ({"C": 0.0}, "FitJob.C is 0.0; expected float above 0 or None"),
    ({"features": "cls"}, "FitJob.features is 'cls'; expected 'msn' or 'embedding'"),
    ({"shots": 0}, "FitJob.shots is 0; expected int from 1 or None"),
    ({"draws": 2}, "--draws repeats the draw of --shots; give --shots too"),
    ({"labelled": "digits"}, "FitJob.labelled is 'digits'; expected Path"),
    (
        {"heads": (Head.ATTENTION,), "target": Target.ONNXRUNTIME},
        "head attention reads queries and keys, which onnxruntime's packed attention",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda x: next(iter(x), ""))
def test_what_no_run_could_do_is_refused_at_once(options, message) -> None:
    with pytest.raises(SpecError) as error:
        FitJob("random:vit-msn-small", **{"labelled": LABELLED, **options})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--C", "0"], "Invalid value for '--C': '0' is no strength; expected a number above 0"),
        (["--C", "much"], "'much' is no strength; expected a number above 0, or auto"),
        (["--C", "inf"], "'inf' is no strength"),
        (["--features", "cls"], "Invalid value for '--features'"),
        (["--test", "nowhere"], "'--test': Path 'nowhere' does not exist"),
        (["--labels", "names.txt"], "No such option"),
    ],
)
def test_usage_errors_name_the_option(arguments, message, tmp_path) -> None:
    result = CliRunner().invoke(main, ["fit", "random:vit-msn-small", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_what_is_read_is_never_written(tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n")
    job = FitJob("random:vit-msn-small", table, labelled=table, force=True)
    with pytest.raises(OutputError, match=r"labels.csv is what is read; choose another"):
        job.validate_paths()
    test = FitJob("random:vit-msn-small", table, labelled=tmp_path, test=table, force=True)
    with pytest.raises(OutputError, match=r"labels.csv is what is read; choose another"):
        test.validate_paths()


def test_the_graph_is_called_classifier() -> None:
    assert FitJob("random:vit-msn-small", labelled=LABELLED).validate_paths() == Path(
        "classifier.onnx"
    )
