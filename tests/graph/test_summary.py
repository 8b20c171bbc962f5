"""The summary of a graph in a manifest."""

from msn_export.graph.summary import GraphSummary
from msn_export.spec import TensorSpec
from tests.builders.graphs import parse


def test_tensors_operators_and_opset_are_read_off() -> None:
    facts = GraphSummary.of(
        parse("""
        g (float[b,3] x, uint8[2] bytes) => (float[b,3] y)
        {
            bent = Gelu (x)
            twice = Add (bent, bent)
            y = Gelu (twice)
        }
        """)
    )
    assert facts.inputs == (TensorSpec("x", "float", ("b", 3)), TensorSpec("bytes", "uint8", (2,)))
    assert facts.outputs == (TensorSpec("y", "float", ("b", 3)),)
    assert (facts.nodes, list(facts.ops.items())) == (3, [("Gelu", 2), ("Add", 1)])
    assert facts.opset == 23
