"""A graph of another tool is run in a child: it may take for ever, or end its process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from msn_export.cli.child import graphs_of_others
from msn_export.files import STAGING_PREFIX

COMMAND = [sys.executable, "-m", "msn_export"]
GO_ON = """
MEMORY = None
import os, signal, sys
from pathlib import Path
from msn_export.cli.child import go_on_in_child
from msn_export.errors import RunnerError
before = os.getpid()
try:
    tell = go_on_in_child([Path("a.onnx")], 300, [Path()], MEMORY)
except RunnerError as error:
    sys.exit(str(error))
assert os.getpid() != before
"""


@pytest.fixture
def slow(tmp_path) -> Path:
    """A graph whose loop is bounded, and takes minutes."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (4, 4)).save(pictures / "a.png")
    kinds = {"n": TensorProto.INT64, "c": TensorProto.BOOL, "d": TensorProto.BOOL}

    def value(name: str) -> onnx.ValueInfoProto:
        shape = [] if name in kinds else [1500, 1500]
        return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c"], ["d"]),
            helper.make_node("MatMul", ["w", "i"], ["p"]),
            helper.make_node("Tanh", ["p"], ["o"]),
        ],
        "body",
        [value(name) for name in "nci"],
        [value(name) for name in "do"],
    )
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(1500, 1500)).astype(np.float32) for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["m", "", "v"], ["last"], body=body),
            helper.make_node("ReduceSum", ["last"], ["sum"], keepdims=0),
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("Add", ["flat", "sum"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 48])],
        [
            numpy_helper.from_array(np.array(9999, np.int64), "m"),
            numpy_helper.from_array(weights[0], "w"),
            numpy_helper.from_array(weights[1], "v"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "slow.onnx"
    onnx.save(model, path)
    return path


def test_a_graph_that_takes_too_long_is_stopped_and_nothing_is_left(slow) -> None:
    before = sorted(slow.parent.iterdir())
    run = subprocess.run(
        [*COMMAND, "embed", "slow.onnx", "pictures", "-o", "e.npy", "--timeout", "3"],
        cwd=slow.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.endswith(
        "error: slow.onnx took longer than --timeout 3 s and was stopped; it has no manifest of "
        "ours, so its run is limited: give more seconds where you trust it\n"
    )
    assert "Traceback" not in run.stderr
    assert [p for p in sorted(slow.parent.iterdir()) if not p.name.endswith(".parts")] == before


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGINT, 3)]
)
def test_an_interrupt_ends_both_also_while_a_library_is_at_work(slow, number, moment) -> None:
    with subprocess.Popen(
        [*COMMAND, "validate", "slow.onnx", "slow.onnx"],
        cwd=slow.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while not (child := children.read_text().split()):
            time.sleep(0.01)
        time.sleep(moment)
        run.send_signal(number)
        assert run.wait(timeout=60) == 130
        assert run.stderr is not None
        assert run.stderr.read().endswith("error: interrupted; nothing was written\n")
    assert not Path(f"/proc/{child[0]}").exists()


def test_a_crash_is_one_line_with_its_signal(tmp_path) -> None:
    code = f"{GO_ON}\nos.kill(os.getpid(), signal.SIGSEGV)"
    stage = tmp_path / f"{STAGING_PREFIX}dead"
    stage.mkdir()
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)  # noqa: PLW1510
    assert run.returncode == 1
    assert run.stderr == (
        "the run of a.onnx crashed (SIGSEGV); msn-export did not write it: export it again, or "
        "check the file with onnx.checker\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_and_the_output_are_the_childs(tmp_path) -> None:
    code = f"{GO_ON}\nprint('done', flush=True)\ntell(3)\nos.abort()"  # when all is done
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)  # noqa: PLW1510
    assert (run.returncode, run.stdout, run.stderr) == (3, "done\n", "")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (None, "the run of a.onnx crashed (exit code 0); msn-export did not write it: "),
        (300 * 2**20, "a library ended the process (exit code 0); most likely there is not enough "
         "memory: the address space is limited to 300 MiB; allow more (ulimit -v)"),
    ],
)  # fmt: skip
def test_an_end_by_a_library_is_no_success(tmp_path, memory, message) -> None:
    code = f"{GO_ON.replace('MEMORY = None', f'MEMORY = {memory}')}\nos._exit(0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)  # noqa: PLW1510
    assert run.returncode == 1
    assert message in run.stderr


@pytest.mark.parametrize("work", ["os.urandom(2**16)", "import time; time.sleep(1)"])
def test_a_library_that_asks_for_memory_for_ever_is_ended(tmp_path, work) -> None:
    code = f"""
from msn_export.cli import child
child._STUCK = 2
{GO_ON.replace("MEMORY = None", "MEMORY = 2**20")}
while True:  # much of the system, or nothing
    {work}
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert run.stderr == (
        "the command stands still; most likely there is not enough memory: the address "
        "space is limited to 1 MiB; allow more (ulimit -v)\n"
    )


def test_graphs_with_a_manifest_and_other_files_stay_in_their_process(tmp_path) -> None:
    for name in ("own.onnx", "own.onnx.json", "foreign.onnx", "m.engine"):
        (tmp_path / name).touch()
    values = [str(tmp_path / "own.onnx"), (tmp_path / "foreign.onnx", tmp_path / "m.engine"), 3,
              None, "a\0b.onnx", tmp_path / "none.onnx"]  # fmt: skip
    assert graphs_of_others(values) == [tmp_path / "foreign.onnx"]


def test_within_another_program_nothing_is_forked(slow, monkeypatch) -> None:
    from click.testing import CliRunner

    from msn_export.cli import main

    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    empty = slow.with_name("empty.onnx")
    empty.touch()
    result = CliRunner().invoke(main, ["validate", str(slow), str(empty)])
    assert result.exit_code == 1
    assert "empty.onnx is not an ONNX file" in result.stderr
