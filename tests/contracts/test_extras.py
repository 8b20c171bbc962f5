"""Each extra, installed alone, brings what its name says: nothing outside of it is imported."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# extra -> modules of the commands that its name stands for
COMMANDS = {
    "ort": ("embed", "bench", "evaluate"),
    "graph": ("calibrate", "trt", "validate", "drift"),
    "export": ("onnx", "hub"),
    "fit": ("fit",),
    "report": ("report",),
    "triton": ("triton",),
    "search": ("embed", "search"),
    "openvino": ("embed", "evaluate"),
}
# Imports in a process where all distributions outside of an extra's are missing
PROGRAM = """
import importlib, json, sys

missing = set(json.loads(sys.argv[1]))

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from msn_export.cli import main
for name in json.loads(sys.argv[2]):
    importlib.import_module(f"msn_export.{name}")
main(json.loads(sys.argv[3]) or ["--help"])
"""


@cache
def closure(extra: str) -> frozenset[str]:
    """List the distributions that ``pip install msn-export[extra]`` brings, as metadata has it."""
    return frozenset(_required("msn-export", frozenset({extra}), set()))


def _required(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    yield canonicalize_name(name)
    for text in importlib.metadata.requires(name) or ():
        one = Requirement(text)
        for extra in extras or {""}:
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            key = (canonicalize_name(one.name), ",".join(sorted(one.extras)))
            if key in seen:
                continue
            seen.add(key)
            try:
                yield from _required(one.name, frozenset({"", *one.extras}), seen)
            except importlib.metadata.PackageNotFoundError:  # another platform's name of it
                continue


def missing_without(extra: str) -> list[str]:
    """List the modules that are here, and would not be where the extra alone is installed."""
    there = closure(extra)
    modules = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, names in modules.items()
        if not {canonicalize_name(name) for name in names} & there
        # no extra brings them; onnxruntime-gpu's module is onnxruntime's too
        and module not in {"msn_export", "setuptools", "pip", "_distutils_hack", "pkg_resources"}
    )


def alone(extra: str, modules: tuple[str, ...], *command: object) -> subprocess.CompletedProcess:
    arguments = [missing_without(extra), modules, [str(part) for part in command]]
    code = [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(json.dumps, arguments)]
    return subprocess.run(code, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("extra", COMMANDS)
def test_an_extra_alone_loads_the_commands_of_its_name(extra) -> None:
    done = alone(extra, tuple(f"commands.{name}" for name in COMMANDS[extra]))
    assert done.returncode == 0, done.stderr


def test_the_blocker_keeps_out_what_an_extra_does_not_bring() -> None:
    assert {"torch", "onnx", "tritonclient", "sklearn"} <= set(missing_without("ort"))
    assert "onnxruntime" not in missing_without("ort")
    done = alone("ort", ("commands.onnx",))
    assert done.returncode == 1
    assert re.search(r"No module named '(torch|onnx\w*)'", done.stderr)


def test_triton_alone_writes_and_checks_a_repository(small_graph: Path, tmp_path: Path) -> None:
    done = alone("triton", (), "triton", small_graph, "-o", tmp_path / "repository")
    assert done.returncode == 0, done.stderr
    done = alone("triton", (), "triton", "--lint", tmp_path / "repository")
    assert done.returncode == 0, done.stderr


def test_report_alone_writes_a_page(small_graph: Path, tmp_path: Path) -> None:
    done = alone("report", (), "report", small_graph, "-o", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()


def test_ort_alone_embeds_pictures(small_graph: Path, photographs: Path, tmp_path: Path) -> None:
    done = alone("ort", (), "embed", small_graph, photographs, "-o", tmp_path / "rows.npy")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_alone_embeds_pictures(
    small_graph: Path, photographs: Path, tmp_path: Path
) -> None:
    command = ("embed", small_graph, photographs, "-o", tmp_path / "rows.npy")
    done = alone("openvino", (), *command, "--providers", "openvino")
    assert done.returncode == 0, done.stderr


def test_search_alone_writes_an_index_and_searches_it(
    small_graph: Path, photographs: Path, tmp_path: Path
) -> None:
    index = tmp_path / "pictures.usearch"
    done = alone("search", (), "embed", small_graph, photographs, "-o", index)
    assert done.returncode == 0, done.stderr
    done = alone("search", (), "search", index, next(photographs.iterdir()))
    assert done.returncode == 0, done.stderr
