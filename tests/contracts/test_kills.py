"""A command that is killed at any moment leaves whole files, and no set of which two are believed.

CI kills each command at a few moments that a seed draws; ``make faults`` at all of them.
"""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from msn_export.manifest import sha256_of
from tests.builders.checkpoints import hugging_face
from tests.builders.fork_server import ForkServer, Outcome, count
from tests.contracts.kills import AT, COUNT

PICTURES = "../pictures"
MODELS = "../models"  # each has the outputs of two commands that differ
LABELLED = "../labelled"
RTX = ("--fp16", "--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--no-check")


class Written(NamedTuple):
    """A command that writes, the outputs it has, and one that reads them; ``at`` draws moments."""

    command: tuple[str, ...]
    outputs: tuple[str, ...]
    reader: tuple[str, ...]
    drawn: int = 2


COMMANDS: dict[str, Written] = {
    "onnx": Written(
        ("onnx", "{source}", "-o", "m.onnx", "--no-check"),
        ("m.onnx", "m.onnx.json"),
        ("inspect", "m.onnx"),
    ),
    "fit": Written(
        ("fit", "{source}", "{labelled}", "-o", "m.onnx", "--images", PICTURES),
        ("m.onnx", "m.onnx.json"),
        ("inspect", "m.onnx"),
        1,
    ),
    "calibrate": Written(
        ("calibrate", "{graph}", "--int8", "--images", PICTURES, "--no-compile", "-o", "m.onnx"),
        ("m.onnx", "m.onnx.json", "m.ranges.json"),
        ("inspect", "m.onnx"),
        1,
    ),
    "trt": Written(
        ("trt", "{graph}", *RTX, "-o", "m.engine"),
        ("m.engine", "m.engine.json"),
        ("inspect", "m.engine"),
        1,
    ),
    "embed": Written(
        ("embed", "{graph}", PICTURES, "-o", "e.npy"),
        ("e.npy", "e.npy.json", "e.npy.rows.jsonl"),
        ("search", "e.npy", f"{PICTURES}/0.png"),
    ),
    "report": Written(
        ("report", "{graph}", "-o", "r.html", "--markdown", "r.md"), ("r.html", "r.md"), (),
    ),
    "triton": Written(
        ("triton", "{graph}", "-o", "repository", "--name", "m"),
        ("repository",),
        ("triton", "--lint", "repository"),
    ),
    "hub": Written(
        ("hub", "{source}", "-o", "folder", "--dtype", "fp32", "--images", PICTURES),
        ("folder",),
        ("inspect", "folder/onnx/model.onnx"),
        1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, their graphs, and pictures: of no class, of two and of three."""
    folder = tmp_path_factory.mktemp("kills")
    generator = np.random.default_rng(0)
    for index in range(6):
        picture = Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        labelled = (f"labelled/old/{index % 2}", f"labelled/new/{index % 3}")
        for inside in ("pictures", *labelled):
            (folder / inside).mkdir(parents=True, exist_ok=True)
            picture.save(folder / inside / f"{index}.png")
    for name, labels in (("old", 3), ("new", 4)):
        source = folder / "models" / name
        source.mkdir(parents=True)
        hugging_face(source, labels=labels)
        graph = ("-o", f"{name}.onnx", "--head", "cls", "--no-check")
        made = server.run("onnx", source, *graph, cwd=folder / "models")
        assert made.code == 0, made.stderr
    return folder


def command_of(written: Written, which: str) -> list[str]:
    model, labelled = f"{MODELS}/{which}", f"{LABELLED}/{which}"
    words = {"source": model, "graph": f"{model}.onnx", "labelled": labelled}
    return [part.format(**words) for part in written.command] + ["--force"]


class Drill(NamedTuple):
    """One command in one folder."""

    server: ForkServer
    written: Written
    folder: Path

    def run(self, which: str, at: int = 0) -> Outcome:
        environment = {AT: str(at), COUNT: str(self.folder.parent / "count")}
        return self.server.run(
            *command_of(self.written, which), cwd=self.folder,
            before="tests.contracts.kills:plant", environment=environment,
        )  # fmt: skip

    def files(self) -> dict[str, str]:
        """Hash what the outputs hold, by name."""
        found = {}
        for name in self.written.outputs:
            path = self.folder / name
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            found |= {str(p.relative_to(self.folder)): sha256_of(p) for p in inside if p.is_file()}
        return found


def drill(server: ForkServer, place: Path, name: str) -> Drill:
    folder = place / f"work-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return Drill(server, COMMANDS[name], folder)


def runs_of(work: Drill, sets: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Name the runs that the outputs are of: by what they hold, or by a hash that they name."""
    found = set()
    for name, content in work.files().items():
        text = (work.folder / name).read_bytes() if name.endswith(STAMPED) else b""
        for which, files in sets.items():
            model = sha256_of(work.folder.parent / "models" / f"{which}.onnx")
            if content == files.get(name) != sets[other(which)].get(name) or any(
                one.encode() in text for one in (model, *map(files.get, HASHED)) if one
            ):
                found.add(which)
    return found


HASHED = ("m.onnx", "m.engine")


def other(which: str) -> str:
    return "old" if which == "new" else "new"


def left_over(work: Drill) -> list[Path]:
    """List what lies in the folder beside the outputs."""
    return [path for path in work.folder.iterdir() if path.name not in work.written.outputs]


def require_sound(work: Drill, at: int, sets: Mapping[str, Mapping[str, str]]) -> None:
    """Kill a run that replaces the old outputs, look at what is there, and run it again."""
    shutil.rmtree(work.folder)
    shutil.copytree(work.folder.with_name("before"), work.folder)
    killed = work.run("new", at)
    assert killed.code == -9, killed.stderr
    left = work.files()
    for name, content in left.items():  # each is whole: a file's bytes are of one of the runs
        same = {sets[which].get(name) for which in sets}
        assert content in same or name.endswith(STAMPED), f"{name} at {at}"
    if work.written.reader and left:
        read = work.server.run(*work.written.reader, cwd=work.folder)
        mixed = len(runs_of(work, sets)) > 1
        if mixed:
            assert read.code == 1, f"a mixed set is believed at {at}: {read.stdout}"
        assert "error: unexpected" not in read.stderr
        assert "Traceback" not in read.stderr
    healed = work.run("new")
    assert healed.code == 0, healed.stderr
    count(f"kill: {work.written.command[0]}", healed, len(left_over(work)))
    entries = {path.name.partition("/")[0] for path in work.folder.iterdir()}
    assert entries == set(work.written.outputs), f"left at {at}"
    again = work.files()
    assert {n: h for n, h in again.items() if not n.endswith(STAMPED)} == {
        n: h for n, h in sets["new"].items() if not n.endswith(STAMPED)
    }


STAMPED = (".json", ".html", ".md", ".jsonl")  # their times differ from run to run


def prepare(
    server: ForkServer, place: Path, name: str
) -> tuple[Drill, int, dict[str, dict[str, str]]]:
    work = drill(server, place, name)
    new = work.run("new")
    assert new.code == 0, new.stderr
    sets = {"new": work.files()}
    shutil.rmtree(work.folder)
    work.folder.mkdir()
    old = work.run("old")
    assert old.code == 0, old.stderr
    sets["old"] = work.files()
    before = work.folder.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(work.folder, before)
    assert work.run("new").code == 0
    count = int((place / "count").read_text())
    return work, count, sets


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "trt"])
def test_a_kill_leaves_no_set_that_is_believed_and_mixed(server, place, name) -> None:
    work, count, sets = prepare(server, place, name)
    for at in sorted(random.Random(name).sample(range(1, count + 1), work.written.drawn)):  # noqa: S311
        require_sound(work, at, sets)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_any_change_leaves_no_set_that_is_believed_and_mixed(server, place, name) -> None:
    work, count, sets = prepare(server, place, name)
    for at in range(1, count + 1):
        require_sound(work, at, sets)
