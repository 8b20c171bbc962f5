"""The real TensorRT modules of several versions, importable where TensorRT itself is not."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fakes.engine_bindings import Names, collect, declared_classes

# PyPI distribution and version -> major of the libraries its module links
RELEASES = {
    ("tensorrt-cu12-bindings", "10.9.0.34"): 10,
    ("tensorrt-cu13-bindings", "10.16.1.11"): 10,
    ("tensorrt-cu13-bindings", "11.0.0.114"): 11,
    ("tensorrt-cu13-bindings", "11.4.0.106"): 11,
}
LEAN = ("tensorrt-lean-cu13-bindings", "11.4.0.106")
_LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin", "libnvinfer_lean")
# What the modules of 10.x and 11.x import from those libraries.
_SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry", "getPluginRegistry", "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)  # fmt: skip
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msn-export-tests"


def make_stubs(folder: Path) -> Path:
    """Compile libraries that define what the modules link, and do nothing."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the stub libraries with")
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS))
    for major in set(RELEASES.values()):
        for library in _LIBRARIES:
            name = f"{library}.so.{major}"
            subprocess.run(
                ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source],
                check=True,
            )
    return folder


def module_of(distribution: str, version: str) -> Path:
    """Install a distribution into the cache, once; skip the test where pip cannot."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    target = CACHE / f"{distribution}-{version}-{python}"
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            run = subprocess.run(
                [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
                 "--target", f"{folder}/module", f"{distribution}=={version}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if run.returncode != 0:
                reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"pip cannot fetch {distribution} {version}: {reason}")
            if not target.is_dir():  # another run may have been faster
                Path(folder, "module").rename(target)
    return target


def names_in(folder: Path, classes: frozenset[str]) -> Names:
    """Collect what the modules of a folder use."""
    names = Names()
    for file in sorted(folder.glob("*.py")):
        source = file.read_text()
        found = collect(source, classes | declared_classes(source))
        found.unclear = [f"{file.name} {text}" for text in found.unclear]
        names |= found
    return names
