"""Which nodes the real CUDA provider takes: its own kernel registry tells, without a GPU.

The provider of the installed onnxruntime-gpu is loaded over CUDA libraries that do nothing.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.graph import io
from tests.builders.artifacts import classifier
from tests.builders.graphs import parse
from tests.builders.tiny_artifacts import pictures
from tests.fakes import cuda_libraries

ROOT = Path(__file__).parent.parent.parent

OPEN = """
import json, sys
from pathlib import Path
from msn_export.errors import MsnExportError
from msn_export.runtime import onnxruntime as subject
from tests.builders.trt_bench import one_device

subject.find_driver = one_device
for line in sys.stdin:
    path, providers = json.loads(line)
    try:
        with subject.OrtRunner(Path(path), providers) as runner:
            reply = {"obtained": runner._session.get_providers(), "on_cpu": runner.on_cpu}
    except MsnExportError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), flush=True)
"""


@cache
def quantised(dtype: str) -> Path:
    output = classifier().with_name(f"{dtype}.onnx")
    images = pictures(classifier().parent / dtype, 12)
    command = ["calibrate", str(classifier()), f"--{dtype}", "-o", str(output), "--no-compile"]
    result = CliRunner().invoke(main, [*command, "--images", str(images)])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = cuda_libraries.make(tmp_path_factory.mktemp("cuda"))
    with subprocess.Popen(
        [sys.executable, "-c", OPEN], cwd=ROOT, env=cuda_libraries.environment(folder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip

        def open_graph(path: Path, *providers: str) -> dict[str, Any]:
            process.stdin.write(json.dumps([str(path), providers]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, process.stderr.read()
            reply: dict[str, Any] = json.loads(line)
            return reply

        yield open_graph


@pytest.mark.parametrize(
    "options",
    [(), ("--target", "portable"), ("--dtype", "fp16"), ("--input", "uint8")],
    ids=lambda options: " ".join(options) or "default",
)
def test_every_node_of_an_exported_graph_has_a_kernel_on_the_gpu(opening, options) -> None:
    reply = opening(classifier(*options), "cuda")
    assert reply == {
        "obtained": ["CUDAExecutionProvider", "CPUExecutionProvider"],
        "on_cpu": {},
    }


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_so_has_every_node_of_a_quantised_graph(opening, dtype) -> None:
    assert opening(quantised(dtype), "cuda").get("on_cpu") == {}


DET = "g (float[b,2,2] x) => (float[b] y) { d = Det (x)   y = Relu (d) }"
SHAPES = """g (float[b,2,3] x) => (float[n,6] y)
<int64 zero = {0}, int64[1] six = {6}, int64[1] a = {0}>
{ s = Shape (x)   n = Gather (s, zero)   u = Unsqueeze (n, a)   t = Concat <axis=0> (u, six)
  r = Reshape (x, t)   y = Relu (r) }"""


@pytest.fixture
def graph(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    io.save(parse(request.param), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("graph", [DET], indirect=True)
def test_a_node_without_a_kernel_is_named_and_runs_on_the_cpu_only_where_that_is_asked_for(
    opening, graph
) -> None:
    import onnxruntime

    assert opening(graph, "cuda") == {
        "error": f"m.onnx: onnxruntime {onnxruntime.__version__} would run 1 Det on the CPU, for "
        "which CUDAExecutionProvider has no kernel; allow it with the CPU as the last of the "
        "providers, as ['cuda', 'cpu']"
    }
    assert opening(graph, "cuda", "cpu")["on_cpu"] == {"Det": 1}


@pytest.mark.parametrize("graph", [SHAPES], indirect=True)
def test_shapes_may_be_computed_on_the_cpu_and_that_is_told(opening, graph) -> None:
    reply = opening(graph, "cuda")
    assert "error" not in reply, reply
    assert set(reply["on_cpu"]) <= {"Shape", "Gather", "Unsqueeze", "Concat"}
