"""Run the same commands in two versions of the code, and compare all that they write and print.

``python scripts/same.py BASE`` compares the working tree with the commit BASE, on this machine:
figures depend on the processor, so that nothing is kept from another run. Both run on the packages
of this environment. What may differ is blanked: times, memory, dates, the library's own version.

The checkpoints are tiny stand-ins for the published shapes, with their patches and head size.
"""

import argparse
import filecmp
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"small": 16, "base": 16, "large": 16, "base-4": 4, "large-7": 7}  # and their patches
RTX = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")
# fields and words that hold times or memory, and the seal over them
_FIELDS = re.compile(r'"(\w*seconds\w*|\w*_ms|\w*rss\w*|seal|created|pid)": [^,\n}]+')
_WORDS = re.compile(r"\d[\d.,]* ?(ms|s|min|MB|GB|MiB|GiB|images/s|pictures/s|a second)\b")
# runs a list of commands in one process, so that the frameworks are loaded once
_RUN = """
import contextlib, io, json, sys, traceback
from pathlib import Path
from msn_export.cli import main
for name, arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments, prog_name="msn-export")
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    Path(f"{name}.txt").write_text(f"{out.getvalue()}\\n--- stderr\\n{err.getvalue()}\\n--- {code}")
"""


def commands() -> Iterator[tuple[str, list[str]]]:
    """Give each command with the name of the file that keeps what it printed."""
    images = ("--images", "photographs")
    for name in ("", "onnx", "trt", "calibrate", "validate", "drift", "inspect", "report", "bench",
                 "embed", "triton", "doctor"):  # fmt: skip
        yield f"help-{name or 'group'}", [*([name] if name else []), "--help"]
    for shape in SHAPES:
        for dtype in ("fp32", "fp16", "bf16"):
            for target in ("tensorrt", "onnxruntime", "tensorrt-8"):
                name = f"{shape}-{dtype}-{target}"
                head = {"small": "tokens", "base": "logits", "large": "mean"}.get(shape, "cls")
                yield name, ["onnx", shape, "-o", f"{name}.onnx", "--dtype", dtype, "--target",
                             target, "--head", head, "--batch", "1:2:4", *images]  # fmt: skip
    yield "uint8", ["onnx", "small", "-o", "uint8.onnx", "--input", "uint8", *images, "--json"]
    for name, flag in (("small", "--fp32"), ("small", "--fp16"), ("small", "--bf16"),
                       ("base", "--fp16"), ("large", "--fp16")):  # fmt: skip
        output = f"{name}{flag}.engine"
        yield output, ["trt", f"{name}-fp32-tensorrt.onnx", flag, *RTX, "-o", output, *images]
    for dtype in ("int8", "fp8"):
        yield dtype, ["calibrate", "small-fp32-tensorrt.onnx", f"--{dtype}", "-o", f"{dtype}.onnx",
                      *images]  # fmt: skip
    yield "int8-cpu", ["calibrate", "base-fp32-onnxruntime.onnx", "--int8", "--no-compile", "-o",
                       "int8-cpu.onnx", *images]  # fmt: skip
    yield "int8-17", ["calibrate", "base-fp32-tensorrt-8.onnx", "--int8", "--no-compile", "-o",
                      "int8-17.onnx", *images]  # fmt: skip
    for kind in ("small-fp16-tensorrt.onnx", "int8.onnx", "small--fp16.engine", "uint8.onnx"):
        yield f"inspect-{kind}", ["inspect", kind]
        yield f"inspect-json-{kind}", ["inspect", kind, "--json"]
    for reference in ("small", "small-fp32-tensorrt.onnx"):
        for candidate in ("small-fp16-tensorrt.onnx", "int8.onnx", "base-fp16-tensorrt.onnx"):
            pair = [reference, candidate, *images]
            yield f"validate-{reference}-{candidate}", ["validate", *pair]
            yield f"drift-{reference}-{candidate}", ["drift", *pair, "--json"]
    yield "report", ["report", "small-fp32-tensorrt.onnx", "small-fp16-tensorrt.onnx",
                     "small--fp16.engine", "-o", "report.html", "--markdown", "report.md",
                     *images]  # fmt: skip
    yield "embed", ["embed", "small-fp32-tensorrt.onnx", "photographs", "-o", "rows.npy"]
    yield "triton", ["triton", "base-fp32-onnxruntime.onnx", "-o", "models", "--ensemble",
                     "--warmup", "--response-cache"]  # fmt: skip
    yield "lint", ["triton", "--lint", "models"]
    yield "missing", ["onnx", "nothing", "-o", "nothing.onnx"]
    yield "wrong", ["trt", "photographs/chelsea.png", "-o", "wrong.engine"]


def write_checkpoints(folder: Path) -> None:
    """Write a tiny checkpoint a shape, with classes, and the photographs."""
    import torch
    from transformers import ViTMSNConfig, ViTMSNForImageClassification

    for seed, (name, patch) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = ViTMSNConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
            image_size=4 * patch, patch_size=patch, num_labels=5,
        )  # fmt: skip
        model = ViTMSNForImageClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder / name)
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "photographs.py", folder / "photographs"], check=True
    )


def lay_out(sources: Path, site: Path) -> None:
    """Make an importable package of a checkout's three folders."""
    shutil.copytree(sources / "exporter", site / "msn_export")
    for name in ("models", "calibration"):
        shutil.copytree(sources / name, site / "msn_export" / name)


def blanked(path: Path) -> bytes:
    """Read a file, without what may differ where it is text."""
    if path.suffix not in {".json", ".txt", ".md", ".html"}:
        return path.read_bytes()
    text = _FIELDS.sub(r'"\1": -', path.read_text(errors="replace"))
    return re.sub(" +", " ", _WORDS.sub(r"- \1", text)).encode()  # columns are as wide as times


def differences(base: Path, tree: Path) -> list[str]:
    """Name the files that only one side has, or that are not the same."""
    found = []
    names = {str(p.relative_to(side)) for side in (base, tree) for p in side.rglob("*")}
    for name in sorted(names):
        one, other = base / name, tree / name
        if one.is_dir() and other.is_dir():
            continue
        if not (one.is_file() and other.is_file()):
            found.append(f"{name}: only in {'base' if one.exists() else 'the working tree'}")
        elif not filecmp.cmp(one, other, shallow=False) and blanked(one) != blanked(other):
            found.append(name)
    return found


def main() -> int:
    """Run both, compare, and keep the two folders where they differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("--only", default="", help="commands whose name has this text")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="same-"))
    archive = subprocess.run(
        ["git", "archive", given.base, "exporter", "models", "calibration"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        packed.extractall(folder / "sources", filter="data")
    write_checkpoints(folder / "given")
    asked: list[Any] = [pair for pair in commands() if given.only in pair[0]]
    running = []
    for name, sources in (("base", folder / "sources"), ("tree", ROOT)):
        lay_out(sources, folder / name / "site")
        shutil.copytree(folder / "given", folder / name / "run")
        environment = {
            **os.environ, "PYTHONPATH": str(folder / name / "site"), "OMP_NUM_THREADS": "1",
            "SOURCE_DATE_EPOCH": "0", "COLUMNS": "100",
        }  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-c", _RUN], cwd=folder / name / "run", env=environment,
            stdin=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdin
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
        running.append(child)
    codes = [child.wait() for child in running]
    if any(codes):
        print(f"a side ended with {codes}; see {folder}")
        return 1
    found = differences(folder / "base" / "run", folder / "tree" / "run")
    print(f"{len(asked)} commands, {len(found)} differences", *found, sep="\n")
    if found:
        print(f"see {folder}/base/run and {folder}/tree/run")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
