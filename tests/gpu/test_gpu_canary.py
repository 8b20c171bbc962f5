"""The first question to a card: does an engine of this TensorRT run there at all?"""

import pytest

from msn_export.runtime import open_runner
from tests.gpu.places import SHAPES, TINY


@pytest.mark.parametrize(("place", "shape"), [("rehearsal", TINY), SHAPES[1]], indirect=["place"])
def test_an_engine_opens_twice_and_gives_its_golden_values(place, shape) -> None:
    artifact = place.canary(shape)
    for _ in range(2):
        with open_runner(artifact) as runner:
            result = runner.selftest()
            assert result.passed, str(result)
