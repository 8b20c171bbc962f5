"""An artifact's residual stream is shown stage by stage, and a block reads what it is given."""

import numpy as np
import pytest

from msn_export.compare.sides import open_artifact
from msn_export.compare.streams import open_blocks, open_stream, what_is_shown
from msn_export.errors import GraphError
from tests.builders.artifacts import classifier, engine

STAGES = ("patch embedding", "block 0", "block 1")
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


def test_a_graph_shows_its_stages_in_order_and_what_is_inside_blocks() -> None:
    shown = what_is_shown(open_artifact(str(classifier())))
    assert tuple(shown.stages) == STAGES
    assert list(shown.inside) == list(STAGES[1:])
    names = {name for tensor in shown.inside["block 0"] for name in tensor}
    assert {"block 0 attention", "block 0 MLP", "blocks.0.attn.qkv"} <= names


def test_a_block_reads_what_it_is_given_and_not_what_came_before() -> None:
    graph = open_artifact(str(classifier()))
    stream = open_stream(graph, ("logits",), STAGES, peaks=True)
    want = stream(IMAGES)
    assert set(stream.peaks) == {"block 0", "block 1"}
    assert all(peak > 0 for peak, _ in stream.peaks.values())
    stream.close()
    blocks = open_blocks(graph, ("logits",), STAGES, ("patch embedding",))
    same = blocks(IMAGES, {"patch embedding": want["patch embedding"]})
    np.testing.assert_allclose(same["block 1"], want["block 1"], rtol=1e-5, atol=1e-5)
    other = blocks(IMAGES, {"patch embedding": np.zeros_like(want["patch embedding"])})
    np.testing.assert_array_equal(other["patch embedding"], same["patch embedding"])
    assert np.abs(other["block 0"] - want["block 0"]).max() > 0.1
    blocks.close()


def test_an_engine_as_it_is_shows_nothing() -> None:
    with pytest.raises(GraphError) as raised:
        what_is_shown(open_artifact(str(engine())))
    assert str(raised.value) == (
        f"{engine()}: an engine shows no tensors on its way; compare the graph it was built from"
    )
