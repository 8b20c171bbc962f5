"""A drill of the Ray Serve application: a replica is killed under load, every client is answered.

Ray runs as in test_ray_embed.py, the service as ``serve run`` starts it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from tests.builders.ray_drills import DRILLS, drill, invoke, require_ray
from tests.builders.tiny_artifacts import classifier, pictures

pytestmark = pytest.mark.slow

COUNT, BATCH, BROKEN = 120, 4, 7


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    require_ray()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("model"), "--batch", f"1:{BATCH}:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, (BROKEN,))


@pytest.fixture(scope="module")
def wanted(model, folder, tmp_path_factory) -> dict[str, dict]:
    """What the model gives for each picture on this machine, by the picture's name."""
    output = tmp_path_factory.mktemp("wanted") / "out.parquet"
    invoke("embed", model, folder, "-o", output)
    return {Path(row["path"]).name: row for row in parquet.read_table(output).to_pylist()}


def test_a_killed_replica_costs_a_client_one_retry_at_most(model, folder, wanted, tmp_path) -> None:
    told = tmp_path / "told.json"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    run = drill(DRILLS / "serving.py", told, model, *paths)
    assert run.returncode == 0, run.stderr
    found = json.loads(told.read_text())
    assert found["about"]["batch"] == BATCH
    assert "passed" in found["about"]["selftest"]
    answers = found["answers"]
    assert len(answers) == 2 * COUNT
    assert [one for one in answers if one["status"] not in {200, 400}] == []
    for one in answers:
        row = wanted[one["name"]]
        if row["error"] is not None:
            assert one["status"] == 400
            assert one["error"].startswith("the posted picture is not a readable picture (")
            continue
        # batches of other sizes sum in another order (measured 1e-6)
        np.testing.assert_allclose(one["embedding"], row["embedding"], rtol=1e-4, atol=2e-5)
        assert one["label"] == row["label"]
    # in the middle of it, and another replica took the killed one's place
    assert len(answers) * 0.3 < sum(one["after"] for one in answers) < len(answers) * 0.7
    assert len(found["before"]) == len(found["after"]) == 2
    assert found["victim"] not in found["after"]
    # requests that came together ran together
    assert max(one.get("batch", 1) for one in answers) > 1
    assert found["seconds_to_stop"] < 60
    assert found["left"] == []
