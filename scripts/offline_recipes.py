"""What an offline bundle holds: a row a recipe, all from PyPI, and what comes of this tree."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parent.parent
# What msn-export and its tests import, and what the machine's own packages do not bring for certain:
# in the versions of constraints.txt, without what each needs in turn, which is in this list too or
# comes with torch, onnx, onnxscript, transformers, scikit-image and pytest.
BESIDE = (
    "click", "hypothesis", "markdown-it-py", "mdurl", "onnx-ir", "onnxsim", "packaging", "Pygments",
    "rich", "sortedcontainers",
)  # fmt: skip
SUITE = ("tests", "benchmarks", "scripts", "pyproject.toml", "constraints.txt")
PACKAGE = ("exporter", "models", "calibration", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Recipe:
    """``wheels`` for CPython ``python``; ``sources`` are pure-Python and exist as sdists only.

    ``drop`` are library files of a wheel that are left out; ``stubs`` (library to C++ source)
    replace those that a module links and the path from ONNX to an engine never calls. ``suite``:
    with msn-export itself, its tests and what they need; else with msn-export alone.
    """

    python: str
    wheels: tuple[str, ...]
    sources: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    interpreter: bool = False
    suite: bool = True


def rtx(version: str, cuda: int = 13) -> Recipe:
    """Give the recipe of a version of TensorRT-RTX, built with the NVRTC of CUDA ``cuda``.

    A driver takes PTX of its own CUDA version at most. The bindings of the driver API are those of
    CUDA 13 for both: a driver of CUDA 13.0 answers them.
    """
    return Recipe(
        "3.12",
        (
            f"tensorrt-rtx-cu{cuda}-libs=={version}",
            f"tensorrt-rtx-cu{cuda}-bindings=={version}",
            "cuda-bindings==13.5.0",
            "cuda-pathfinder==1.9.0",
        ),
        sources=(f"tensorrt-rtx-cu{cuda}=={version}", f"tensorrt-rtx=={version}"),
    )


RECIPES = {
    "tensorrt-rtx": rtx("1.6.1.120"),
    "tensorrt-rtx-cu12": rtx("1.6.1.120", cuda=12),
    "tensorrt-rtx-1.7": rtx("1.7.1.116"),
    "tensorrt-8.6": Recipe(
        "3.10",
        ("tensorrt==8.6.0", "numpy==1.26.4", "cuda-bindings==13.4.4", "cuda-pathfinder==1.8.3"),
        drop=("libnvinfer_plugin.so.8", "libnvparsers.so.8"),
        stubs=("libnvinfer_plugin.so.8", "libnvparsers.so.8"),
        interpreter=True,
        suite=False,
    ),
    "onnxruntime-gpu": Recipe("3.12", ("onnxruntime-gpu==1.31.1", "flatbuffers==25.12.19")),
}


def pinned(packages: Iterable[str]) -> tuple[str, ...]:
    """Give packages in the versions the tests ran with."""
    known = {}
    for row in (TREE / "constraints.txt").read_text().splitlines():
        name, _, version = row.partition("==")
        known[name.lower().replace("_", "-")] = version
    return tuple(f"{package}=={known[package.lower()]}" for package in packages)
