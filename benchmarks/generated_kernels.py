"""Compile the generated kernels of an engine for a GPU, and count registers, spills and access widths.

    pip install --target CUDA nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12
    pip install --target CUDA/tools nvidia-cuda-nvdisasm
    python benchmarks/generated_kernels.py --cuda CUDA [--variant vit-msn-small] [--input float]

TensorRT-RTX keeps the CUDA source of the kernels that it generated (norms, casts, copies) as text in
the engine, and compiles it on the user's machine. This script does that with NVRTC and reads the result
with nvdisasm; both run without a GPU. A kernel that stores two bytes at a time makes eight times as many
store instructions as one that stores sixteen. Local loads and stores are spilled registers and arrays.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "generated_kernels.json"
CAPABILITY = "8.9"
_TEXT = re.compile(rb"[\t\n\x20-\x7e]{1000,}")
_ENTRY = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+?)_0x[0-9a-f]+\('
)
_ACCESS = re.compile(r"\b(LDG|STG|LDL|STL)\.E?([A-Z0-9.]*)")
_WIDTHS = (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2))
# NVRTC brings no C++ library; the sources take this one header of it
_CLIMITS = b"#define INT_MAX 2147483647\n#define INT_MIN (-2147483647 - 1)\n"


class Nvrtc:
    """NVRTC of a folder that pip wrote."""

    def __init__(self, folder: Path, capability: str) -> None:
        self._library = ctypes.CDLL(str(found(folder, "libnvrtc.so.*")))
        include = found(folder, "cuda_fp16.h").parent
        architecture = capability.replace(".", "")
        self._options = [
            f"--gpu-architecture=sm_{architecture}", f"--include-path={include}", "--std=c++17",
            "-D__HAS_FP16",
        ]  # fmt: skip

    def cubin(self, source: bytes) -> bytes | str:
        """Compile to machine code, or give the first error."""
        library, program = self._library, ctypes.c_void_p()
        headers, names = (ctypes.c_char_p * 1)(_CLIMITS), (ctypes.c_char_p * 1)(b"climits")
        self._require(
            library.nvrtcCreateProgram(
                ctypes.byref(program), source, b"kernel.cu", 1, headers, names
            )
        )
        options = (ctypes.c_char_p * len(self._options))(*(one.encode() for one in self._options))
        failed = library.nvrtcCompileProgram(program, len(options), options)
        kind = "ProgramLog" if failed else "CUBIN"
        size = ctypes.c_size_t()
        self._require(getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        result = ctypes.create_string_buffer(size.value)
        self._require(getattr(library, f"nvrtcGet{kind}")(program, result))
        library.nvrtcDestroyProgram(ctypes.byref(program))
        if not failed:
            return result.raw
        lines = result.raw.decode(errors="replace").splitlines()
        return next((line for line in lines if "error" in line), lines[0])

    def _require(self, code: int) -> None:
        if code:
            raise SystemExit(f"NVRTC failed with code {code}")


def found(folder: Path, pattern: str) -> Path:
    """Find a file of the packages."""
    paths = [path for path in sorted(folder.rglob(pattern)) if ".alt." not in path.name]
    if not paths:
        raise SystemExit(f"no {pattern} in {folder}; install the packages that --help names")
    return paths[0]


def sources(engine: Path) -> Iterator[tuple[str, bytes]]:
    """Give each generated source of an engine once, with its kernel's name without the hash."""
    seen = set()
    for text in _TEXT.findall(engine.read_bytes()):
        entry = _ENTRY.search(text.decode())
        if entry is not None and entry[0] not in seen:
            seen.add(entry[0])
            yield entry[1].removeprefix("__myl_"), text


def read(code: bytes, nvdisasm: Path) -> dict[str, Any]:
    """Count registers, and global and local accesses by width in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        shown = subprocess.run(
            [str(nvdisasm), file.name], check=True, capture_output=True, text=True
        )
    registers = [int(count) for count in re.findall(r"SHI_REGISTERS=(\d+)", shown.stdout)]
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("LDG", "STG", "LDL", "STL")}
    for kind, modifiers in _ACCESS.findall(shown.stdout):
        parts = modifiers.split(".")
        counts[kind][next((size for mark, size in _WIDTHS if mark in parts), 4)] += 1
    return {
        "registers": max(registers, default=None),
        "loads": dict(sorted(counts["LDG"].items())),
        "stores": dict(sorted(counts["STG"].items())),
        "local": counts["LDL"].total() + counts["STL"].total(),
    }


def build(options: argparse.Namespace, folder: Path) -> Path:
    """Export a shape in fp16 with a fixed batch and compile it."""
    graph, engine = folder / "model.onnx", folder / "model.engine"
    for arguments in (
        ["onnx", f"random:{options.variant}:0", "--input", options.input, "--dtype", "fp16", "--batch",
         str(options.batch), "--islands", "none", "--no-check", "-o", str(graph)],
        ["trt", str(graph), "--backend", "tensorrt-rtx", "--compute-capability", CAPABILITY,
         "--no-check", "-o", str(engine)],
    ):  # fmt: skip
        command = [sys.executable, "-m", "msn_export", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return engine


def main() -> None:
    """Compile, count, print a line a kernel and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", type=Path, required=True, help="where the packages were put")
    parser.add_argument("--engine", type=Path, help="an engine, instead of one that is built")
    parser.add_argument("--variant", default="vit-msn-small")
    parser.add_argument("--input", choices=("uint8", "float"), default="uint8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    nvrtc, nvdisasm = Nvrtc(options.cuda, CAPABILITY), found(options.cuda, "nvdisasm")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        engine = options.engine or build(options, Path(name))
        for kernel, source in sources(engine):
            code = nvrtc.cubin(source)
            told = {"refused": code} if isinstance(code, str) else read(code, nvdisasm)
            rows.append({"kernel": kernel} | told)
            print(rows[-1], flush=True)
    result = {
        "variant": options.variant, "input": options.input, "batch": options.batch,
        "capability": CAPABILITY, "kernels": rows,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
