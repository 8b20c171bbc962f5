"""A portable graph runs, and is right, in the runtimes that docs/clients.md names.

``make clients`` runs those that need an environment of their own, which is made in build/clients.
"""

import sys
from pathlib import Path

import clients
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from clients import CLIENTS, TESTED
from onnx.reference import ReferenceEvaluator

from msn_export.cli import main
from msn_export.onnx_header import read_onnx_header

# Of float32 computed in another order: measured up to 1.6e-6
CLOSE = 1e-5
# Each rounds beside 8 bits in its own way: measured up to 1.4e-2
CLOSE_INT8 = 3e-2
FLOAT = ("--target", "portable", "--head", "cls", "--head", "logits")
HEADS = [f"--head={head}" for head in ("cls", "mean", "tokens", "logits", "features")]
UINT8 = ("--target", "portable", "--input", "uint8", "--normalize", *HEADS)
# transformers.js takes a folder: tests/clients/test_version_table.py runs it
EVERYWHERE = [
    ("onnxruntime", "1.17.3"),
    *((name, version) for name, version in TESTED.items() if name != "transformers.js"),
]


def inputs(path: Path) -> tuple[str, np.ndarray]:
    """Draw a batch of three for a graph's one input."""
    (value,) = onnx.load(path).graph.input
    sizes = [size.dim_value or 3 for size in value.type.tensor_type.shape.dim]
    dtype = "uint8" if value.name == "images" else "float32"
    return value.name, clients.images(dtype, sizes)


def expected(path: Path) -> dict[str, np.ndarray]:
    """Run it in the onnxruntime that its check ran in."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    name, images = inputs(path)
    return dict(zip(names, session.run(names, {name: images}), strict=True))


def require_close(found: dict[str, np.ndarray], path: Path, limit: float) -> None:
    right = expected(path)
    assert len(found) == len(right)
    for (name, want), got in zip(right.items(), found.values(), strict=True):  # tract renames
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= limit, name


def in_client(name: str, version: str, path: Path) -> dict[str, np.ndarray]:
    client = CLIENTS[name]
    return clients.run(client, clients.installed(client, version), path, *inputs(path))


def quantised(path: Path, photographs: Path, folder: Path) -> Path:
    output = folder / "int8.onnx"
    arguments = ["calibrate", str(path), "--int8", "-o", str(output), "--images", str(photographs),
                 "--gate-cosine", "0.9", "--no-compile"]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return output


def test_it_is_of_opset_17_without_operators_of_others(export) -> None:
    model = onnx.load(export(*FLOAT))
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 17)]
    assert model.ir_version == 8  # onnx 1.12's, as opset 17 is
    assert {node.domain for node in model.graph.node} == {""}
    assert not {"Attention", "Gelu"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("options", [FLOAT, UINT8], ids=["float", "uint8"])
def test_the_reference_evaluator_of_onnx_runs_it(export, options) -> None:
    path = export(*options)
    name, images = inputs(path)
    evaluator = ReferenceEvaluator(str(path))
    outputs = evaluator.run(None, {name: images})
    require_close(dict(zip(evaluator.output_names, outputs, strict=True)), path, CLOSE)


def test_its_other_name_writes_the_same_file(export) -> None:
    path, other = export(*FLOAT), export("--target", "tensorrt-8", *FLOAT[2:])
    assert path.read_bytes() == other.read_bytes()
    assert read_onnx_header(path).metadata["target"] == "portable"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), EVERYWHERE, ids=lambda value: value)
@pytest.mark.parametrize("options", [FLOAT, UINT8], ids=["float", "uint8"])
def test_every_client_computes_what_onnxruntime_does(export, name, version, options) -> None:
    path = export(*options)
    require_close(in_client(name, version, path), path, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), EVERYWHERE)
def test_its_int8_twin_runs_where_it_does(export, photographs, tmp_path, name, version) -> None:
    path = quantised(export(*FLOAT), photographs, tmp_path)
    require_close(in_client(name, version, path), path, CLOSE_INT8)


@pytest.mark.slow
def test_an_old_onnxruntime_opens_it_with_our_runtime_and_names_what_the_others_need(
    export,
) -> None:
    """Nothing but NumPy and onnxruntime 1.17 is installed there."""
    environment = clients.installed(CLIENTS["onnxruntime"], "1.17.3")
    import msn_export

    code = """
import sys
sys.path.append(sys.argv[1])
from msn_export.runtime import open_runner
for path in sys.argv[2:]:
    try:
        with open_runner(path, providers=["cpu"]) as runner:
            print(runner.selftest().passed)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
    import subprocess

    package = Path(msn_export.__file__).parent.parent
    new = export("--target", "tensorrt", *FLOAT[2:])
    python = environment / "venv/bin/python"
    run = subprocess.run(
        [python, "-I", "-c", code, package, export(*FLOAT), new],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened, refused = run.stdout.splitlines()
    assert opened == "True"
    assert refused == (
        f"GraphError: {new.name} needs onnxruntime 1.23.0 or later, and here is 1.17.3; upgrade "
        "it, or export the model with --target portable, which 1.17.3 loads"
    )
    assert sys.version_info[:2] == (3, 11) or run.stderr == ""
