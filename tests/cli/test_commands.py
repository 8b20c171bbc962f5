"""Exit codes and messages: 2 for usage, naming the option; 1 with one line for our errors."""

import logging
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.errors import GraphError

HERE = Path(__file__)


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "x", "--batch", "9:1"], "Invalid value for '--batch': batch '9:1' is not a size"),
        (["onnx", "x", "--batch", "9:1:2"], "'--batch': batch range 9:1:2 is not ordered"),
        (["onnx", "x", "--image-size", "big"], "'--image-size': image size 'big' is not a size"),
        (["onnx", "x", "--head", "tail"], "Invalid value for '--head'"),
        (["onnx", "x", "--dtype", "fp8"], "Invalid value for '--dtype'"),
        (["onnx", "x", "--images", "nowhere"], "'--images': Path 'nowhere' does not exist"),
        (["onnx"], "Missing argument 'CHECKPOINT'"),
        (["trt", "x", "--compute-capability", "ada"], "capability 'ada' is not a version"),
        (
            ["onnx", "x", "--dtype", "INT8"],
            "'INT8' is not one of fp32, fp16, bf16; 8 bits take ranges: export fp32, and quantise "
            "it with msn-export calibrate --int8",
        ),
        (["fit", "x", ".", "--dtype", "fp8"], "quantise it with msn-export calibrate --fp8"),
        (["onnx", "x", "--dtype", "fp64"], "'fp64' is not one of 'fp32', 'fp16', 'bf16'."),
        (
            ["trt", str(HERE), "--dtype", "fp16"],
            "No such option '--dtype' of trt; use --fp32, --fp16 or --bf16",
        ),
        (["trt", str(HERE), "--dtype", "int8"], "quantise the fp32 graph with msn-export calib"),
        (["trt", str(HERE), "--int8"], "quantise the fp32 graph with msn-export calibrate"),
        (["trt", "x", "--workspace", "much"], "'much' is no amount of memory"),
        (["trt", "x", "--optimization-level", "9"], "Invalid value for '--optimization-level'"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_usage_errors_name_the_option_and_exit_with_2(arguments, message) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["onnx", "{}/smal"],
        ["fit", "{}/smal", "{}"],
        ["trt", "{}/smal.onnx"],
        ["calibrate", "{}/smal.onnx", "--int8", "--images", "{}"],
        ["calibrate", "{}/small.onnx", "--int8", "--images", "{}/smal"],
        ["validate", "{}/small.onnx", "{}/smal.onnx"],
        ["drift", "{}/smal.onnx", "{}/small.onnx"],
        ["report", "{}/smal.onnx"],
        ["inspect", "{}/smal.onnx"],
        ["bench", "{}/smal.onnx"],
        ["embed", "{}/small.onnx", "{}/smal", "-o", "x.npy"],
        ["evaluate", "{}/smal.onnx", "{}"],
        ["triton", "{}/smal.onnx", "-o", "{}/repository"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_mistyped_path_is_a_usage_error_that_names_what_is_near(tmp_path, arguments) -> None:
    (tmp_path / "small.onnx").touch()
    (tmp_path / "small").mkdir()
    result = invoke(*(part.format(tmp_path) for part in arguments))
    assert result.exit_code == 2
    near = "small.onnx" if any("smal.onnx" in part for part in arguments) else "small"
    assert (
        f"does not exist{'' if near == 'small' and arguments[0] in {'onnx', 'fit'} else '; '}"
        in (result.output)
    )
    assert f"did you mean {tmp_path / near}?" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "random:vit-msn-small", "-o", "m.engine"], "m.engine does not end in .onnx"),
        (["trt", "{}", "-o", "m.onnx"], "m.onnx does not end in .engine, .plan or .trt"),
        (["calibrate", "{}", "--int8", "--images", ".", "-o", "m"], "m does not end in .onnx"),
        (["report", "{}", "-o", "m.pdf"], "m.pdf does not end in .html or .htm"),
        (["report", "{}", "--markdown", "m.html"], "m.html does not end in .md"),
        (["bench", "{}", "--report", "m.json"], "m.json does not end in .html or .htm"),
        (["embed", "{}", ".", "-o", "m.csv"], "m.csv does not end in .npy, .parquet or .usearch"),
    ],
)
def test_an_ending_is_checked_before_any_work(arguments, message) -> None:
    result = invoke(*(part.format(HERE) for part in arguments))
    assert result.exit_code == 2
    assert message in result.output


def test_a_mistyped_folder_is_no_failure_of_the_hub(tmp_path, monkeypatch) -> None:
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = invoke("onnx", "models/smal")
    assert result.exit_code == 2
    assert "does not exist in the folder models" in result.output
    assert "give models/smal@main; did you mean models/small?" in result.output


def test_our_errors_are_one_line_and_exit_with_1(tmp_path) -> None:
    (tmp_path / "none.onnx").touch()
    result = invoke("trt", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "x.engine"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.output


def test_verbose_shows_the_traceback(tmp_path) -> None:
    (tmp_path / "none.onnx").touch()
    command = [sys.executable, "-m", "msn_export"]
    run = subprocess.run(
        [*command, "-v", "trt", "none.onnx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" in run.stderr


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("onnx_ir", ["trt", "x.onnx"], "graph"),
        ("onnx_ir", ["onnx", "random:vit-msn-small"], "export"),
        ("torch", ["onnx", "random:vit-msn-small"], "export"),
        ("torch", ["validate", "random:vit-msn-small", "random:vit-msn-small"], "export"),
    ],
)
def test_a_missing_package_says_what_to_install(tmp_path, missing, arguments, extra) -> None:
    # a process of its own: modules that are imported a second time here would be twice
    (tmp_path / "x.onnx").touch()
    script = f"import sys; sys.modules[{missing!r}] = None; from msn_export.cli import main; main()"
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    told = f"error: package {missing} is not installed; pip install 'msn-export[{extra}]'\n"
    assert run.stderr.splitlines(keepends=True)[-1] == told


HELP = "from msn_export.cli import main; main(['--help'], standalone_mode=False)"


@pytest.mark.parametrize("code", ["import msn_export", "import msn_export.cli", HELP])
def test_importing_loads_nothing_heavy(code) -> None:
    heavy = ["torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "PIL", "rich"]
    script = f"import sys; {code}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == "[]"


# a change of what is held is one for users: msn-export COMMAND --help > the file, in 80 columns
HELPS = Path(__file__).parent.parent / "data" / "help"


def test_help_names_every_command_that_there_is() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in main.commands:
        assert name in result.output
    assert {path.stem for path in HELPS.iterdir()} == {"msn-export", *main.commands}


@pytest.mark.parametrize("path", sorted(HELPS.iterdir()), ids=lambda path: path.stem)
def test_the_help_of_each_command_is_what_was_agreed(path) -> None:
    command = [path.stem] if path.stem in main.commands else []
    result = CliRunner().invoke(
        main, [*command, "--help"], prog_name="msn-export", terminal_width=78
    )
    assert result.exit_code == 0
    assert result.output == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", main.commands)
def test_the_help_of_a_command_loads_nothing_heavy(name) -> None:
    code = f"from msn_export.cli import main; main([{name!r}, '--help'], standalone_mode=False)"
    test_importing_loads_nothing_heavy(code)


@pytest.mark.parametrize("name", main.commands)
def test_the_examples_of_a_command_are_commands(name) -> None:
    command = main.commands[name]
    _, _, examples = str(command.help).partition("Examples:")
    lines = [shlex.split(line) for line in examples.strip().splitlines()]
    assert len(lines) == 2
    for product, called, *arguments in lines:
        assert (product, called) == ("msn-export", name)
        parser = command.make_parser(click.Context(command))
        _, rest, _ = parser.parse_args(arguments)  # an option that there is not raises
        assert rest == []


def test_the_help_is_as_wide_as_the_terminal_and_sentences_are_whole() -> None:
    wide = CliRunner().invoke(main, ["--help"], terminal_width=150).output
    for command in main.commands.values():
        sentence = str(command.help).split("\n\n")[0].rstrip(".").split(". ")[0]
        assert sentence.replace("\n", " ") in wide


def test_choices_take_either_case() -> None:
    parsed = main.commands["onnx"].make_context("onnx", ["random:vit-msn-small", "--dtype", "FP16"])
    assert parsed.params["dtype"] == "fp16"


def fail_with(monkeypatch, error: BaseException) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("msn_export.compare.inspection.inspect", broken)


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            KeyError("ker\x1b[2Jnels\n" + "x" * 9000),
            "unexpected KeyError: 'ker\\x1b[2Jnels\\nxxx",
        ),
        (RecursionError("too deep"), "unexpected RecursionError: too deep; -v shows where, please"),
        (MemoryError(), "there is not enough memory; use a machine with more"),
        (
            ImportError("libtorch.so: failed to map segment from shared object"),
            "there is not enough memory (libtorch.so: failed to map segment from shared object); ",
        ),
        (
            raised(GraphError("onnxruntime refuses g.onnx"), RuntimeError("\n" * 9 + "bad_alloc")),
            "there is not enough memory (bad_alloc); use a machine with more",
        ),
    ],
)
def test_what_nobody_expects_is_one_line_too(monkeypatch, tmp_path, error, message) -> None:
    fail_with(monkeypatch, error)
    (tmp_path / "m.onnx").touch()
    result = invoke("inspect", str(tmp_path / "m.onnx"))
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.isprintable()
    assert len(line) < 2100


def test_and_its_traceback_is_there_for_who_asks(monkeypatch, tmp_path) -> None:
    fail_with(monkeypatch, KeyError("kernels"))
    (tmp_path / "m.onnx").touch()
    result = invoke("-v", "inspect", str(tmp_path / "m.onnx"))
    assert isinstance(result.exception, KeyError)


def test_a_librarys_remark_is_one_line_that_no_terminal_obeys(monkeypatch, tmp_path) -> None:
    def remark(*_: object, **__: object) -> None:
        logging.getLogger("onnx_ir").warning("input %r\x1b[2J\nof %s", "a", "b")
        raise GraphError("that was all")

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's
    monkeypatch.setattr("msn_export.compare.inspection.inspect", remark)
    (tmp_path / "m.onnx").touch()
    result = invoke("inspect", str(tmp_path / "m.onnx"))
    assert result.stderr.splitlines() == ["input 'a' [2J of b", "error: that was all"]
