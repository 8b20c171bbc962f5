"""What production installs: the wheel with [ort] alone runs an exported model, without the rest."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from msn_export import image_folder
from msn_export.runtime import open_runner
from tests.builders.artifacts import classifier

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnx_ir", "click", "rich", "tensorrt"}:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
import numpy
from msn_export.runtime import open_runner

assert not {"onnxruntime", "PIL"} & set(sys.modules)
with open_runner(sys.argv[1], providers=["cpu"]) as runner:
    assert runner.selftest().passed
    assert "PIL" not in sys.modules
    batch = runner.preprocess(sys.argv[3:])
    logits = runner(batch).logits
    print(runner.top_k(logits, 1)[0][0].label)
    numpy.save(sys.argv[2], logits)
"""


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it with its extra into an environment of its own."""
    if not (ROOT / "exporter").is_dir():
        pytest.skip("there is no source tree here to build from")
    folder = tmp_path_factory.mktemp("production")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"{wheel}[ort]",
         "--constraint", ROOT / "constraints.txt"],
        check=True,
    )  # fmt: skip
    return python


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_with_ort_alone_runs_an_exported_model(production, photographs, tmp_path) -> None:
    listed = subprocess.run(
        [production, "-m", "pip", "list", "--format", "freeze"],
        capture_output=True, text=True, check=True,
    ).stdout.lower()  # fmt: skip
    assert "onnxruntime" in listed
    assert not [name for name in ("torch", "onnx==", "onnx-ir", "cuda") if f"\n{name}" in listed]
    paths = image_folder.find(photographs).paths[:3]
    output = tmp_path / "logits.npy"
    run = subprocess.run(
        [production, "-I", "-c", SCRIPT, classifier(), output, *paths],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("class ")
    with open_runner(classifier(), providers=["cpu"]) as runner:
        np.testing.assert_array_equal(np.load(output), runner(runner.preprocess(paths)).logits)
