"""Mutated files of every kind: a command ends with its exit code and one line, and leaves nothing.

CI draws the same cases each time; ``make fuzz`` draws others, and many.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.builders.checkpoints import hugging_face, processor
from tests.contracts.fuzz import TARGETS, try_one

# of each kind in CI; the whole takes half a minute there
CASES = {"graph": 24, "manifest": 24, "ranges": 6, "configuration": 12, "preprocessing": 10}
MORE = int(os.environ.get("FUZZ_CASES", "0"))


@pytest.fixture(scope="module")
def place(server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind as it is written, beside what the commands take besides."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    (folder / "tiny").mkdir()
    hugging_face(folder / "tiny", labels=3)
    heads = ("--head", "cls", "--head", "logits")
    calibrated = ("--int8", "--images", "pictures", "--no-compile", "-o", "q.onnx")
    for command in (
        ("onnx", "tiny", "-o", "m.onnx", *heads, "--images", "pictures"),
        ("calibrate", "m.onnx", *calibrated),
    ):
        made = server.run(*command, cwd=folder)
        assert made.code == 0, made.stderr
    shutil.copy(folder / "m.onnx", folder / "g.onnx")
    half = [0.5, 0.5, 0.5]
    size = {"height": 32, "width": 32}
    processor(folder, do_resize=True, size=size, resample=2, image_mean=half, image_std=half)
    (folder / "preprocessor_config.json").rename(folder / "p.json")
    return folder


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_one_line_or_a_result(server, place, name) -> None:
    @settings(
        max_examples=MORE or CASES[name],
        derandomize=not MORE,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # what is found is as small as it has to be
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try_one(server, place, name, data)

    run()
