"""Pictures are decoded in order, never too far ahead, and a crash costs one picture."""

import hashlib
import os
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from msn_export import image_folder, images
from msn_export.embedding.decode import Decoder, read
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize
from tests.builders.decoders import deadly, marking, slow_when_early
from tests.builders.tiny_artifacts import pictures

HF = preset("hf", ImageSize(32, 32))


def decode(paths, read, *, workers: int, ahead: int):
    with closing(Decoder(read, workers=workers, ahead=ahead)) as decoder:
        yield from decoder(paths)


def test_order_is_that_of_the_paths_whoever_is_ready_first() -> None:
    paths = [Path(str(number)) for number in range(20)]
    got = [int(one.pixels[0, 0, 0]) for one in decode(paths, slow_when_early, workers=3, ahead=8)]
    assert got == list(range(20))


def test_no_more_are_decoded_than_may_wait(tmp_path) -> None:
    paths = [Path(f"{number:02}") for number in range(30)]
    stream = decode(paths, partial(marking, folder=tmp_path), workers=1, ahead=5)
    for _ in range(4):
        next(stream)
    time.sleep(0.5)  # whoever would run ahead has had the time
    assert len(list(tmp_path.iterdir())) <= 9
    stream.close()


def test_pixels_are_those_of_the_one_preprocessing(tmp_path) -> None:
    paths = image_folder.find(pictures(tmp_path, 3)).paths
    got = list(decode(paths, partial(read, preprocessing=HF), workers=1, ahead=2))
    for path, fitted in zip(paths, got, strict=True):
        np.testing.assert_array_equal(fitted.pixels, images.read(path, HF))
        assert fitted.sha256 == hashlib.sha256(path.read_bytes()).digest()


def test_a_file_is_read_once_for_its_pixels_and_its_hash(tmp_path, monkeypatch) -> None:
    (path,) = image_folder.find(pictures(tmp_path, 1)).paths
    opened = []
    whole = Path.open

    def counted(self, *arguments):
        opened.append(self)
        return whole(self, *arguments)

    monkeypatch.setattr(Path, "open", counted)
    assert not isinstance(read(path, HF), str)
    assert opened == [path]


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(2**30 + 1)
    assert read(path, HF) == (
        f"{path} is not a readable picture (it has {2**30 + 1} bytes; at most {2**30} are read)"
    )
    assert read(tmp_path / "gone.png", HF, "gone") == (
        "gone is not a readable picture (No such file or directory)"
    )


def test_a_broken_picture_is_its_reason(tmp_path) -> None:
    paths = image_folder.find(pictures(tmp_path, 3, broken=(1,))).paths
    got = list(decode(paths, partial(read, preprocessing=HF), workers=1, ahead=2))
    texts = [found for found in got if isinstance(found, str)]
    assert len(texts) == 1
    assert "001.png is not a readable picture" in texts[0]


@pytest.mark.parametrize("ahead", [1, 6])
def test_a_picture_that_kills_its_decoder_costs_no_other(ahead) -> None:
    names = ["a", "deadly 1", "b", "c", "deadly 2", "d"]
    got = list(decode([Path(name) for name in names], deadly, workers=2, ahead=ahead))
    told = [found if isinstance(found, str) else None for found in got]
    assert told == [
        None,
        "deadly 1 is not a readable picture (its decoder crashed)",
        None,
        None,
        "deadly 2 is not a readable picture (its decoder crashed)",
        None,
    ]


def test_a_decoder_imports_nothing_from_the_current_folder(tmp_path, monkeypatch) -> None:
    # python -c, with which multiprocessing starts a process, would look there first
    for module in ("multiprocessing", "json", "numpy", "threading"):
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(1)\n"
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    got = list(decode([Path("1"), Path("2")], slow_when_early, workers=2, ahead=2))
    assert not (tmp_path / "ran").exists()
    assert not any(isinstance(one, str) for one in got)
    assert "PYTHONSAFEPATH" not in os.environ


SCRIPT = """
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from msn_export.embedding.decode import Decoder, read
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize
print("the script runs")
paths = sorted(Path(sys.argv[1]).rglob("*.png"))
one = partial(read, preprocessing=preset("hf", ImageSize(32, 32)))
with closing(Decoder(one, workers=2, ahead=4)) as decoder:
    print([found for found in decoder(paths) if isinstance(found, str)])
print(__spec__ and __spec__.name)
"""


@pytest.mark.parametrize(("start", "name"), [(["script.py"], "None"), (["-m", "script"], "script")])
def test_a_script_without_a_main_guard_runs_once(tmp_path, start, name) -> None:
    pictures(tmp_path / "pictures", 5)
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, *start, "pictures"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["the script runs", "[]", name]
