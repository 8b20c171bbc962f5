"""What is to be compiled is checked and survives JSON."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.engine.options import BuildSpec
from msn_export.errors import SpecError
from msn_export.schema import from_plain, to_plain
from msn_export.spec import BatchRange, ComputeCapability, Dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": ()}, "no batch range; give at least one --batch"),
        ({"profiles": (BatchRange(), BatchRange())}, "--batch 1:8:32 is given twice"),
        (
            {"capabilities": (ComputeCapability(8, 9),) * 2},
            r"--compute-capability 8\.9 is given tw",
        ),
        (
            {"optimization_level": 6},
            "BuildSpec.optimization_level is 6; expected int from 0 to 5 or None",
        ),
        ({"workspace": 0}, "BuildSpec.workspace is 0; expected int from 1 or None"),
        ({"timeout": float("nan")}, "BuildSpec.timeout is nan; expected float above 0 or None"),
        ({"memory_limit": -1}, "BuildSpec.memory_limit is -1; expected int from 1 or None"),
    ],
)
def test_a_spec_that_makes_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        BuildSpec(**{"model": Path("x.onnx"), "profiles": (BatchRange(),), **options})


def test_a_spec_survives_json() -> None:
    spec = BuildSpec(
        Path("x.onnx"), (BatchRange(), BatchRange(64, 64, 64)), (ComputeCapability(8, 9),),
        Dtype.FP16, 1 << 30, 3, Path("t.cache"), True, True, timeout=60.0,
        memory_limit=1 << 32,
    )  # fmt: skip
    assert from_plain(BuildSpec, to_plain(spec), "spec") == spec
    bare = BuildSpec(Path("x.onnx"), (BatchRange(),))
    assert from_plain(BuildSpec, to_plain(bare), "spec") == bare


specs = st.builds(
    BuildSpec,
    st.just(Path("a b/x.onnx")),
    st.lists(
        st.lists(st.integers(1, 99), min_size=3, max_size=3).map(lambda x: BatchRange(*sorted(x))),
        min_size=1,
        max_size=3,
        unique=True,
    ).map(tuple),
    st.lists(
        st.builds(ComputeCapability, st.integers(0, 99), st.integers(0, 9)),
        max_size=3,
        unique=True,
    ).map(tuple),
    precision=st.none() | st.sampled_from(Dtype),
    workspace=st.none() | st.integers(1, 1 << 40),
    optimization_level=st.none() | st.integers(0, 5),
    timing_cache=st.none() | st.just(Path("cache")),
    version_compatible=st.booleans(),
    hardware_compatible=st.booleans(),
    tf32=st.booleans(),
    allow_unfused=st.booleans(),
    timeout=st.none() | st.floats(0.1, 1e6),
    memory_limit=st.none() | st.integers(1, 1 << 40),
)


@given(specs)
def test_every_spec_reaches_the_compilers_process_as_it_is(spec) -> None:
    assert from_plain(BuildSpec, json.loads(json.dumps(to_plain(spec))), "spec") == spec
