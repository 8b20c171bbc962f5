"""CUDA's libraries as onnxruntime's CUDA provider links them, whose functions do nothing.

With them the real provider loads where there is no GPU, and a session is made: onnxruntime then
assigns each node to a provider by the provider's own kernel registry. Nothing can be run. The
libraries must be found before onnxruntime looks for them: ``environment`` is for such a process.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What must be answered for a provider to be made; every other function returns 0
_ANSWERS = {
    "cudaGetDeviceCount": "int {}(int *count) {{ *count = 1; return 0; }}",
    "cudaGetDevice": "int {}(int *device) {{ *device = 0; return 0; }}",
    "cudaGetDeviceProperties_v2": "int {}(char *p) {{ memset(p, 0, 720); return 0; }}",
    "cudaGetDeviceProperties": "int {}(char *p) {{ memset(p, 0, 720); return 0; }}",
    "cudaMalloc": "int {}(void **p, size_t size) {{ *p = malloc(size); return 0; }}",
    "cudaHostAlloc": "int {}(void **p, size_t size) {{ *p = malloc(size); return 0; }}",
    "cudaMallocHost": "int {}(void **p, size_t size) {{ *p = malloc(size); return 0; }}",
    "cudaMemGetInfo": "int {}(size_t *a, size_t *b) {{ *a = *b = 1ul << 33; return 0; }}",
    "cudaStreamCreateWithFlags": "int {}(void **made) {{ *made = (void *)16; return 0; }}",
    "cublasCreate_v2": "int {}(void **made) {{ *made = (void *)16; return 0; }}",
    "cublasLtCreate": "int {}(void **made) {{ *made = (void *)16; return 0; }}",
    "cudnnCreate": "int {}(void **made) {{ *made = (void *)16; return 0; }}",
    "cudaGetErrorString": 'const char *{}(void) {{ return "none"; }}',
    "cudaGetErrorName": 'const char *{}(void) {{ return "none"; }}',
    "cudnnGetErrorString": 'const char *{}(void) {{ return "none"; }}',
}
_NOTHING = "long {}(void) {{ return 0; }}"
_TOOLS = ("cc", "nm", "readelf")


def make(folder: Path) -> Path:
    """Compile the libraries that the installed onnxruntime-gpu links; skip where that cannot be."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    provider = Path(found.origin).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        pytest.skip("this onnxruntime has no CUDA provider")
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"there is no {missing[0]} here")
    needed = re.findall(r"NEEDED.*\[(libcu\S+)\]", _output("readelf", "-d", provider))
    # a versioned name says of which library it is
    undefined = [line.split()[-1] for line in _output("nm", "-uD", provider).splitlines()]
    for library in needed:
        own = [name.split("@")[0] for name in undefined if name.endswith(f"@{library}")]
        bare = library.startswith("libcuda.so")  # the driver's names have no version
        own += [name for name in undefined if bare and re.fullmatch(r"cu[A-Z]\w+", name)]
        _compile(folder / library, own, "" if bare else library)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Give the variables of a process that finds the libraries of a folder."""
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def _compile(library: Path, names: list[str], version: str) -> None:
    functions = (_ANSWERS.get(name, _NOTHING).format(name) for name in names)
    source = "\n".join(("#include <stdlib.h>", "#include <string.h>", *functions))
    script = library.with_suffix(".map")
    script.write_text(f"{version} {{ global: *; }};")
    subprocess.run(
        ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}",
         f"-Wl,--version-script={script}", "-xc", "-", "-o", library],
        input=source.encode(), check=True, capture_output=True,
    )  # fmt: skip


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
