"""The commands, given an engine that runs here."""

import json

import numpy as np
import pytest

from msn_export.spec import Dtype
from tests.gpu.places import TINY

pytestmark = pytest.mark.parametrize(
    ("place", "shape"),
    [("rehearsal", TINY), pytest.param("card", "vit-msn-small", marks=pytest.mark.gpu)],
    indirect=["place"],
)


def test_validate_compares_the_checkpoint_with_the_engine(place, shape) -> None:
    built = place.build(shape, Dtype.FP16)
    arguments = (place.source(shape), str(built.artifact), *place.images(), "--json")
    done = place.command("validate", *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"] is True


def test_drift_reads_the_stream_of_each(place, shape) -> None:
    built = place.build(shape, Dtype.FP16)
    done = place.command("drift", str(built.master), str(built.artifact), *place.images(), "--json")
    assert done.exit_code == 0, done.output
    depth = place.checkpoint(shape).config.depth
    stages = [row["tensor"]["name"] for row in json.loads(done.stdout)["stages"]]
    blocks = [stage for stage in stages if stage.startswith("block ")]
    assert blocks == [f"block {index}" for index in range(depth)]


def test_embed_runs_a_folder(place, shape, tmp_path) -> None:
    built = place.build(shape, Dtype.FP16)
    out = tmp_path / "out.npy"
    done = place.command("embed", str(built.artifact), str(place.photographs), "-o", str(out))
    assert done.exit_code == 0, done.output
    embeddings = np.load(out)
    assert embeddings.shape == (16, place.checkpoint(shape).config.dim)
    assert np.isfinite(embeddings).all()


def test_bench_times_it_beside_torch(place, shape) -> None:
    built = place.build(shape, Dtype.FP16)
    options = ("--rounds", "1", "--seconds", "0.1", "--batch", "2", "--json", *place.images())
    checkpoint = ("--checkpoint", place.source(shape))
    done = place.command("bench", str(built.artifact), *options, *checkpoint)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["timings"]
    assert {row["contender"] for row in rows} == {"sdpa", built.artifact.name}
    assert all(row["agreement"]["cosine_p1"] > 0.99 for row in rows)
