"""Two artifacts are brought together the same way whatever the interpreter's hash seed."""

import subprocess
import sys
from dataclasses import replace

import pytest
from artifacts import copy_of, engine
from checkpoints import hugging_face

from msn_export import manifest
from msn_export.proof.artifact import open_artifact
from msn_export.proof.pair import open_pair
from msn_export.spec import InputKind


def test_of_two_checkpoints_the_reference_says_the_image_size(tmp_path) -> None:
    for size in (32, 48):
        hugging_face(tmp_path / str(size), image_size=size)
    names = [str(tmp_path / "32"), str(tmp_path / "48")]
    assert str(open_pair(*names).reference.size) == "32x32"
    assert str(open_pair(*reversed(names)).candidate.size) == "48x48"


@pytest.mark.parametrize("seed", ["1", "3"])
def test_no_order_depends_on_a_hash_seed(tmp_path, seed) -> None:
    for size in (32, 48):
        hugging_face(tmp_path / str(size), image_size=size)
    code = (
        "import sys; from msn_export.proof.pair import open_pair; "
        "print(open_pair(*sys.argv[1:]).candidate.size)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "32"), str(tmp_path / "48")],
        env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "32x32\n"


@pytest.mark.parametrize(
    ("dtype", "stem"), [("uint8", InputKind.UINT8), ("float32", InputKind.FLOAT)]
)
def test_an_engine_of_a_foreign_graph_keeps_its_inputs_name(tmp_path, dtype, stem) -> None:
    copy = copy_of(engine(), tmp_path)
    known = manifest.read(copy)
    assert known is not None
    taken = replace(known.inputs[0], name="x", dtype=dtype)
    text = manifest.seal(replace(known, inputs=(taken,)))
    manifest.manifest_path(copy).write_text(text)
    assert open_artifact(str(copy)).stem is stem
