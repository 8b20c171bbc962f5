"""Builds are reproducible, cancellable, limited, and say in one sentence why they fail."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from msn_export.engine import build as subject
from msn_export.engine.build import build_engine
from msn_export.engine.options import Backend, BuildStep
from msn_export.errors import BuildError, OutputError
from msn_export.spec import ComputeCapability, Targets
from tests.builders.engine_builds import built, graph, rtx, spec_of
from tests.builders.engine_graphs import Vit

DEEP = Vit(depth=24)  # long enough to be interrupted


def test_result_tells_what_was_built(tmp_path: Path) -> None:
    seen: list[BuildStep] = []
    engine, log = tmp_path / "vit.engine", tmp_path / "vit.log"
    result = build_engine(spec_of(Vit()), rtx(), engine, log, seen.append)
    assert result.bytes == engine.stat().st_size > 1_000_000
    assert result.targets == Targets((ComputeCapability(8, 9),))
    assert result.notes == ()
    assert 0 < result.seconds < 60
    assert 50 * 2**20 < result.peak_rss < 2 * 2**30
    assert len(result.census.kernels) == 22
    assert "[V] Layers:\nName: " in log.read_text()
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert seen[-1] == BuildStep("done", 1, 1, 1.0)
    assert len({progress.phase for progress in seen}) > 5


def test_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    elsewhere = tmp_path / "other name.onnx"
    elsewhere.write_bytes(graph(Vit()).read_bytes())
    again = build_engine(replace(spec_of(Vit()), model=elsewhere), rtx(), tmp_path / "b.engine")
    assert again.output.read_bytes() == built(Vit()).output.read_bytes()


# --- graphs that cannot be compiled ---------------------------------------------------------------


def edited(folder: Path, edit: Callable[[onnx.ModelProto], None], vit: Vit) -> Path:
    model = onnx.load(graph(vit))
    edit(model)
    path = folder / "edited.onnx"
    onnx.save(model, path)
    return path


def of_onnxruntime(model: onnx.ModelProto) -> None:
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.op_type, gelu.domain = "BiasGelu", "com.microsoft"


def with_plugin(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "EfficientNMS_Custom"


def with_mixed_types(model: onnx.ModelProto) -> None:
    pos = next(item for item in model.graph.initializer if item.name == "pos")
    values = numpy_helper.to_array(pos).astype(np.float32)
    pos.CopyFrom(numpy_helper.from_array(values, "pos"))


def with_dynamic_height(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def without_a_node(model: onnx.ModelProto) -> None:
    del model.graph.node[3]


def unchanged(_model: onnx.ModelProto) -> None: ...


# (graph it starts from, what is done to it, what the message must say)
BAD_GRAPHS = [
    (Vit(), of_onnxruntime, r"cannot read edited\.onnx: node 'blocks\.0\.gelu' \(BiasGelu\): Tens"
     r"orRT has no importer for this operator; if onnxruntime optimised the graph"),
    (Vit(), with_plugin, r"\(EfficientNMS_Custom\): TensorRT has no importer"),
    (Vit(), with_mixed_types, r"node 'pos\.Add' \(Add\): it mixes Half and Float operands without"),
    (Vit(), with_dynamic_height, r"input 'x' is \[-1, 3, -1, 32\]: only the batch may be dynamic"),
    (Vit(), without_a_node, r"cannot read edited\.onnx: node '\S+' \(\w+\): "),
    (Vit(dtype="fp32"), unchanged, r"cannot compile edited\.onnx: TensorRT has no fused kernel for"
     r" this graph's Attention operator .*; build an fp16 graph, or --allow-unfused"),
    (Vit(quantised="int8", zero_point=3), unchanged, r"node 'blocks\.0\.attn\.qkv\.input\.Quantize"
     r"' \(QuantizeLinear\): the graph is quantised with zero points other than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("vit", "edit", "message"), BAD_GRAPHS, ids=range(len(BAD_GRAPHS)))
def test_a_graph_that_does_not_compile_says_why(
    tmp_path: Path, vit: Vit, edit: Callable[[onnx.ModelProto], None], message: str
) -> None:
    spec = replace(spec_of(vit), model=edited(tmp_path, edit, vit))
    log = tmp_path / "raw.log"
    with pytest.raises(BuildError, match=message) as raised:
        build_engine(spec, rtx(), tmp_path / "x.engine", log)
    assert "\n" not in str(raised.value)
    assert log.stat().st_size > 0
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: data[: len(data) // 2], "it is not an ONNX file, or a truncated one"),
        (lambda data: b"", "it holds no graph with an output"),
        (lambda data: b"hello world" * 99, "it holds no graph with an output"),
    ],
)
def test_a_file_that_is_no_graph(
    tmp_path: Path, content: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content(graph(Vit()).read_bytes()))
    with pytest.raises(BuildError, match=message):
        build_engine(replace(spec_of(Vit()), model=path), rtx(), tmp_path / "x.engine")


def test_a_missing_file_and_missing_weights(tmp_path: Path) -> None:
    spec = replace(spec_of(Vit()), model=tmp_path / "absent.onnx")
    with pytest.raises(BuildError, match=r"graph .*absent\.onnx does not exist"):
        build_engine(spec, rtx(), tmp_path / "x.engine")
    path = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(graph(Vit())), path, save_as_external_data=True, location="w.bin",
        size_threshold=16,
    )  # fmt: skip
    (tmp_path / "w.bin").unlink()
    with pytest.raises(
        BuildError, match=r"the weight 'patch\.weight' cannot be read; is the graph"
    ):
        build_engine(replace(spec, model=path), rtx(), tmp_path / "x.engine")


def test_attention_is_taken_apart_where_that_is_allowed() -> None:
    census = built(Vit(dtype="fp32"), decompose=True).census
    assert census.fused_attention == ()
    assert census.gemm_dtypes == {"Float": 12}
    kept = built(Vit(), decompose=True).census  # where a fused kernel exists it is taken
    assert len(kept.fused_attention) == 2


def test_an_engine_that_claims_other_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(targets=Targets((ComputeCapability(12, 0),)))
    monkeypatch.setattr(subject, "read_header", lambda _path: other)
    with pytest.raises(BuildError, match=r"asked for SM 8\.9, and the engine claims SM 12\.0"):
        build_engine(spec_of(Vit()), rtx(), Path(graph(Vit())).with_suffix(".claims"))


# --- limits, interruptions, crashes ---------------------------------------------------------------


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def no_child_stays() -> Iterator[None]:
    """Another test's child, as multiprocessing's tracker of resources, may be there before."""
    before = set(children_of(os.getpid()))
    yield
    assert set(children_of(os.getpid())) <= before


@pytest.mark.usefixtures("no_child_stays")
def test_a_timeout_ends_the_build(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BuildError, match=r"^the build took longer than its limit of 0\.2 s$"):
        build_engine(spec_of(DEEP, timeout=0.2), rtx(), tmp_path / "x.engine")
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("no_child_stays")
def test_a_memory_limit_ends_the_build(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"^the build needs more than its memory limit of 0\.10 GiB \(it was at "
    ):
        build_engine(spec_of(Vit(), memory_limit=100 << 20), rtx(), tmp_path / "x.engine")


@pytest.mark.usefixtures("no_child_stays")
def test_an_error_in_the_progress_display_ends_the_build(tmp_path: Path) -> None:
    def interrupt(_progress: BuildStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(spec_of(DEEP), rtx(), tmp_path / "x.engine", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from msn_export.engine.options import find_backend
from msn_export.engine.build import build_engine
from msn_export.engine.options import BuildSpec
from msn_export.spec import BatchRange
spec = BuildSpec(Path(sys.argv[1]), (BatchRange(),))
tell = lambda progress: print(progress.phase, flush=True)
try:
    build_engine(spec, find_backend("tensorrt-rtx"), Path(sys.argv[2]), None, tell)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_compiler_does_not_outlive_its_parent(tmp_path: Path, end: signal.Signals) -> None:
    rtx()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, graph(DEEP), tmp_path / "x.engine"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        parent.stdout.readline()  # the build is under way
        compilers = children_of(parent.pid)
        assert len(compilers) == 1
        parent.send_signal(end)
        _, errors = parent.communicate(timeout=20)
        wait_until(lambda: not is_alive(compilers[0]))
    assert parent.returncode == (130 if end == signal.SIGINT else -end)
    assert errors == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; print('deep inside', flush=True); os.kill(os.getpid(), 11)",
         r"^the TensorRT compiler crashed \(SIGSEGV\)\. Its last line: deep inside$"),
        ("import os; os.kill(os.getpid(), 9)",
         r"^the TensorRT compiler was killed \(SIGKILL\), most likely because memory ran out"),
        ("import os; os._exit(3)", r"^the TensorRT compiler ended without a result \(exit 3\)"),
        ("raise MemoryError", "there is not enough memory"),
        ("raise RuntimeError('no')", "TensorRT's Python module raised RuntimeError: no"),
    ],
)  # fmt: skip
def test_a_crash_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "crashing.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    backend = Backend(replace(rtx().row, module="crashing"), "1.7")
    for log in (None, tmp_path / "raw.log"):
        with pytest.raises(BuildError, match=message):
            build_engine(spec_of(Vit()), backend, tmp_path / "x.engine", log)


def test_a_compiler_that_waits_for_itself_without_memory_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "waiting.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("msn_export.engine.build._IDLE", 1.0)
    monkeypatch.setattr("msn_export.engine.build.address_space_limit", lambda: 2**29)
    backend = Backend(replace(rtx().row, module="waiting"), "1.7")
    with pytest.raises(BuildError, match=r"waits for itself, most likely .* not enough memory"):
        build_engine(spec_of(Vit()), backend, tmp_path / "x.engine")


def test_an_engine_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """The caller's staging folder turns a full disk into its own message."""
    with pytest.raises(FileNotFoundError):
        build_engine(spec_of(Vit()), rtx(), tmp_path / "absent" / "x.engine")


def test_a_log_that_cannot_be_written_is_told_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"log .*absent/x\.log cannot be written: No such file"):
        build_engine(spec_of(Vit()), rtx(), tmp_path / "x", tmp_path / "absent" / "x.log")
