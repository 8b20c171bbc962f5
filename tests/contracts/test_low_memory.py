"""Where the address space is limited a command ends with one line, and leaves nothing.

Libraries then raise what they like, end the process or crash. CI tries a limit for each moment at
which memory ends: the start, the imports, the run; ``make faults`` every command with many.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders.checkpoints import hugging_face
from tests.builders.fork_server import Outcome, count

MIB = 2**20
RTX = ("--fp16", "--backend", "tensorrt-rtx", "--compute-capability", "8.9")
COMMANDS: dict[str, tuple[str, ...]] = {
    "onnx": ("tiny", "-o", "o.onnx", "--images", "pictures"),
    "fit": ("tiny", "labelled", "-o", "o.onnx", "--images", "pictures"),
    "calibrate": ("m.onnx", "--int8", "--images", "pictures", "--no-compile", "-o", "o.onnx"),
    "trt": ("m.onnx", *RTX, "--images", "pictures", "-o", "o.engine"),
    "validate": ("tiny", "m.onnx", "--images", "pictures"),
    "drift": ("m.onnx", "q.onnx", "--images", "pictures"),
    "evaluate": ("m.onnx", "labelled", "--knn", "2"),
    "report": ("m.onnx", "-o", "o.html", "--markdown", "o.md"),
    "inspect": ("m.onnx",),
    "bench": ("m.onnx", "--seconds", "0.2"),
    "embed": ("m.onnx", "pictures", "-o", "o.usearch"),
    "search": ("e.usearch", "pictures/0.png"),
    "triton": ("m.onnx", "-o", "repository", "--name", "m"),
    "hub": ("tiny", "-o", "folder", "--images", "pictures"),
    "doctor": (),
}


@pytest.fixture(scope="module")
def place(server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its graphs in fp32 and int8, an index, and pictures."""
    folder = tmp_path_factory.mktemp("memory")
    generator = np.random.default_rng(0)
    for index in range(8):
        picture = Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        for inside in ("pictures", f"labelled/{'ab'[index % 2]}"):
            (folder / inside).mkdir(parents=True, exist_ok=True)
            picture.save(folder / inside / f"{index}.png")
    (folder / "tiny").mkdir()
    hugging_face(folder / "tiny", labels=3)
    images = ("--images", "pictures")
    for command in (
        ("onnx", "tiny", "-o", "m.onnx", "--head", "cls", *images),
        ("calibrate", "m.onnx", "--int8", *images, "--no-compile", "-o", "q.onnx"),
        ("embed", "m.onnx", "pictures", "-o", "e.usearch"),
    ):
        made = server.run(*command, cwd=folder)
        assert made.code == 0, made.stderr
    return folder


def run(name: str, memory: int, folder: Path) -> Outcome:
    """Run a command in ``memory`` bytes of address space."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "msn_export", name, *COMMANDS[name]], cwd=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started, 0)


def is_taken_up(path: Path) -> bool:
    """True for rows that the next run goes on from, as after any interruption."""
    return any(part.endswith((".parts", ".onnx.fit")) for part in path.parts)


def require_one_line_or_a_result(name: str, mib: int, folder: Path) -> Outcome:
    """Run a command; on failure its last line is the error, about memory, and nothing is new."""
    before = sorted(folder.rglob("*"))
    outcome = run(name, mib * MIB, folder)
    new = [p for p in sorted(folder.rglob("*")) if p not in before and not is_taken_up(p)]
    what = f"{name} in {mib} MiB: {outcome}"
    count(f"memory: {name}", outcome, len(new) if outcome.code else 0)
    assert "Traceback" not in outcome.stderr, what
    assert "unexpected" not in outcome.stderr, what
    if outcome.code == 0:
        return outcome
    assert outcome.code == 1, what
    if name != "doctor":  # which says on stdout what is broken
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert errors == [outcome.last], what
        assert "memory" in outcome.last, what
    assert new == [], what
    return outcome


@pytest.mark.parametrize(
    ("name", "mib", "what"),
    [
        ("onnx", 60, "there is not enough memory ("),  # an import of NumPy raises
        ("embed", 100, "a library ended the process ("),  # or calls exit
        ("onnx", 400, "failed to map segment from shared object); allow more (ulimit -v)"),
        ("trt", 300, ""),
        ("calibrate", 300, ""),
        ("fit", 900, ""),
    ],
)
def test_a_command_without_enough_memory_ends_in_one_line(place, name, mib, what) -> None:
    outcome = require_one_line_or_a_result(name, mib, place)
    assert outcome.code == 1
    assert what in outcome.last


@pytest.mark.slow
@pytest.mark.parametrize("mib", [60, 120, 300, 800, 1300])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_in_little_memory(place, tmp_path, name, mib) -> None:
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    require_one_line_or_a_result(name, mib, tmp_path)
