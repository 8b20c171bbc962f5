"""Other runtimes of ONNX files, each in an environment of its own below build/clients.

A client is a package of PyPI or npm; its program in tests/data/clients runs one graph on one batch.

    python scripts/clients.py onnxruntime 1.17.3 MODEL.onnx

makes the environment on its first use, runs three seeded images and prints each output's shape.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).absolute().parent.parent
FOLDER = Path(os.environ.get("MSN_EXPORT_CLIENTS", ROOT / "build/clients"))
PROGRAMS = ROOT / "tests/data/clients"
INSTALL_WITHIN = 900.0  # seconds
RUN_WITHIN = 120.0


@dataclass(frozen=True, slots=True)
class Client:
    """A runtime of others; ``also`` are packages beside it, ``arguments`` of its program.

    ``executes`` is False where it builds an engine and a GPU would have to run that.
    """

    name: str
    package: str
    program: str
    also: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    executes: bool = True

    @property
    def is_npm(self) -> bool:
        return self.program.endswith(".mjs")


CLIENTS = {
    client.name: client
    for client in (
        # built with NumPy 1 until 1.19
        Client("onnxruntime", "onnxruntime", "with_onnxruntime.py", also=("numpy<2",)),
        Client("onnxruntime-node", "onnxruntime-node", "with_onnxruntime.mjs",
               arguments=("onnxruntime-node",)),
        Client("onnxruntime-web", "onnxruntime-web", "with_onnxruntime.mjs",
               arguments=("onnxruntime-web",)),
        Client("openvino", "openvino", "with_openvino.py"),
        Client("transformers.js", "@huggingface/transformers", "with_transformers.mjs"),
        # in one environment: what optimum asks of transformers is not what the tests run
        Client("optimum", "optimum-onnx", "with_optimum.py", also=(
            "optimum==2.1.0", "transformers==4.57.6", "torch==2.13.0", "onnx==1.23.2",
            "onnxruntime==1.32.0", "pillow",
        )),
        Client("tract", "tract", "with_tract.py", also=("numpy",)),
        Client("tensorrt-rtx", "tensorrt-rtx-cu13", "with_tensorrt_rtx.py",
               also=("numpy",), arguments=("8.9",), executes=False),
    )
}  # fmt: skip


# What the tests run; scripts/version_table.py finds the least versions
TESTED = {
    "onnxruntime": "1.32.0",
    "onnxruntime-node": "1.30.0",
    "onnxruntime-web": "1.30.0",
    "openvino": "2026.4.1",
    "transformers.js": "4.3.2",
    "tract": "0.23.9",
    "optimum": "0.1.0",
}


class ClientError(Exception):
    """A client cannot be installed, or does not run a graph; the message is its last line."""


def installed(client: Client, version: str, interpreters: Sequence[str] = ()) -> Path:
    """Make a version's environment once; give its folder.

    Args:
        client: the runtime.
        version: of its package.
        interpreters: Pythons to try, the first that has a wheel of it; this one by default.

    Raises:
        ClientError: the registry has no such version for any of these Pythons.
    """
    requirements = [f"{client.package}{'@' if client.is_npm else '=='}{version}", *client.also]
    folder = FOLDER / f"{client.name}-{version}"
    with _locked(folder):
        done = folder / "installed"
        if done.is_file() and done.read_text() == "\n".join(requirements):
            return folder
        for interpreter in interpreters or (sys.executable,):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                if client.is_npm:
                    _npm(folder, requirements)
                else:
                    _pip(folder, requirements, interpreter)
            except ClientError as error:
                reason = error
                continue
            done.write_text("\n".join(requirements))
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        raise reason


def _pip(folder: Path, requirements: Sequence[str], interpreter: str) -> None:
    _call([interpreter, "-m", "venv", folder / "venv"], folder, INSTALL_WITHIN)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--prefer-binary"]
    _call([*pip, *requirements], folder, INSTALL_WITHIN)


def _npm(folder: Path, requirements: Sequence[str]) -> None:
    (folder / "package.json").write_text('{"private": true}\n')
    # the CPU's libraries are in the packages; their scripts would fetch those of CUDA
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    _call([*npm, *requirements], folder, INSTALL_WITHIN)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the other processes of a test run from making the same environment."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(
    client: Client, environment: Path | None, graph: Path, name: str, images: NDArray[Any]
) -> dict[str, NDArray[np.float64]]:
    """Run a graph on one batch; give its outputs by name, none where nothing is executed.

    Args:
        client: the runtime.
        environment: the folder that ``installed`` gave; None for this interpreter's own package.
        graph: the file; for transformers.js the model's folder.
        name: of the graph's input.
        images: for that input.

    Raises:
        ClientError: it does not run the graph.
    """
    given = {"name": name, "dtype": str(images.dtype), "shape": images.shape}
    content = np.ascontiguousarray(images).tobytes()
    return _run(environment, client.program, graph, client.arguments, given, content)


def run_folder(
    client: Client, environment: Path, folder: Path, pictures: Sequence[Path], *arguments: str
) -> dict[str, NDArray[np.float64]]:
    """Run pictures through a folder that ``msn-export hub`` wrote; give the outputs by name.

    Args:
        client: the runtime; its program begins with ``folder_``.
        environment: the folder that ``installed`` gave.
        folder: the model's.
        pictures: files.
        arguments: of the program.

    Raises:
        ClientError: it does not run the folder.
    """
    given = {"pictures": [str(picture.absolute()) for picture in pictures]}
    return _run(environment, f"folder_{client.program}", folder, arguments, given, b"")


def _run(
    environment: Path | None, name: str, model: Path, arguments: Sequence[str],
    given: dict[str, Any], content: bytes,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "input.json").write_text(json.dumps(given))
        (Path(work) / "input.bin").write_bytes(content)
        python = environment / "venv/bin/python" if environment else sys.executable
        by = ["node"] if name.endswith(".mjs") else [python, "-I"]
        program = [PROGRAMS / name, model.absolute(), work, *arguments]
        _call([*by, *program], environment or Path(work), RUN_WITHIN)
        outputs = json.loads((Path(work) / "outputs.json").read_text())
    return {
        output: np.array(found["values"], np.float64).reshape(found["shape"])
        for output, found in outputs.items()
    }


def _call(command: Sequence[object], folder: Path, within: float) -> None:
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=within,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"not done after {within:.0f} s") from error
    except FileNotFoundError as error:
        raise ClientError(f"{error.filename} is not installed") from error
    if done.returncode < 0:
        raise ClientError(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise ClientError(_reason(done.stderr) or f"exit code {done.returncode}")


# A line that names an exception, as Python, Node, pip and npm print it
_EXCEPTION = re.compile(
    r"^(?:npm error (?!code|A complete)|ERROR: |Uncaught |[A-Za-z_][\w.]*: )", re.M
)


def _reason(stderr: str) -> str:
    """Find what went wrong: from the last line that names an exception on, without a stack."""
    lines = [line for line in stderr.splitlines() if not line.startswith(("WARNING", "Node.js v"))]
    text = "\n".join(lines)
    starts = [match.start() for match in _EXCEPTION.finditer(text)]
    found = text[starts[-1] :] if starts else (lines or [""])[-1]
    return " ".join(re.split(r"\n\s+at |\n\s*Stack", found)[0].split())[:3000]


def images(dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    """Draw a seeded batch: bytes, or floats as normalisation leaves them."""
    random = np.random.default_rng(0)
    if dtype == "uint8":
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape).astype(np.float32)


def main() -> int:
    """Run a graph in one version of a client."""
    if len(sys.argv) != 4 or sys.argv[1] not in CLIENTS:
        print(f"{__doc__}\nclients: {', '.join(CLIENTS)}", file=sys.stderr)
        return 2
    import onnx

    client, graph = CLIENTS[sys.argv[1]], Path(sys.argv[3])
    (value,) = onnx.load(graph, load_external_data=False).graph.input
    sizes = [size.dim_value or 3 for size in value.type.tensor_type.shape.dim]
    dtype = "uint8" if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8 else "float32"
    try:
        found = run(client, installed(client, sys.argv[2]), graph, value.name, images(dtype, sizes))
    except ClientError as error:
        print(f"{client.name} {sys.argv[2]}: {error}", file=sys.stderr)
        return 1
    for name, array in found.items():
        print(f"{name} {list(array.shape)}, norm {np.linalg.norm(array):.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
