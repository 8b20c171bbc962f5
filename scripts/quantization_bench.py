"""Artifacts that scripts/quantization.py makes once, and how it writes what is known of them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Told = dict[str, Any]
FORMS = ("int8", "fp8")


@dataclass(frozen=True)
class Bench:
    """A folder of artifacts that are made once."""

    folder: Path
    images: Path

    def run(self, output: str, *arguments: str) -> Told:
        """Run a command that writes ``output``, unless it was; give its manifest."""
        path = self.folder / output
        manifest = path.with_name(f"{output}.json")
        if not manifest.is_file():
            command = [
                sys.executable,
                "-m",
                "msn_export",
                *arguments,
                "-o",
                str(path),
                "--json",
            ]
            print(" ".join(("msn-export", *arguments)), flush=True)
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        told: Told = json.loads(manifest.read_text())
        return told

    def export(self, output: str, checkpoint: str, images: Path, *options: str) -> Told:
        """Export a graph."""
        return self.run(output, "onnx", checkpoint, "--images", str(images), *options)

    def calibrate(self, output: str, graph: str, images: Path, *options: str) -> Told:
        """Quantise one."""
        path = str(self.folder / graph)
        return self.run(output, "calibrate", path, "--images", str(images), *options)


def row(*cells: object) -> str:
    """Write a row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def percent(share: float | None) -> str:
    """Write a share; an unknown one is none."""
    return "none" if share is None else f"{share:.0%}"


def strength(told: Told) -> str:
    """Name the smoothing that was taken."""
    taken = told["quantization"]["smoothing"]
    return "off" if taken is None else f"{taken:g}"
