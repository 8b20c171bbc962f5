"""What is to be compiled is checked and survives JSON; nested phases are one fraction."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.engine.options import BuildSpec, BuildStep, Phases
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
    assert bare.options_set() == {}
    assert len(spec.options_set()) == 9


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


def test_nested_phases_are_one_fraction() -> None:
    phases = Phases()
    phases.start("build", None, 2)
    phases.start("optimise", "build", 4)
    assert phases.step("optimise", 1) == BuildStep("optimise", 2, 4, 0.25)
    phases.finish("optimise")
    assert phases.step("build", 0) == BuildStep("build", 1, 2, 0.5)
    assert phases.start("optimise", "build", 4) == BuildStep("optimise", 0, 4, 0.5)
    assert phases.step("unheard of", 0) is None
    assert phases.step("build", 7) == BuildStep("build", 2, 2, 1.0)


def test_fraction_never_goes_back() -> None:
    phases = Phases()
    phases.start("build", None, 1)
    phases.start("a", "build", 2)
    phases.step("a", 1)
    phases.finish("a")
    again = phases.start("b", "build", 2)
    assert again.fraction == 1.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["start", "step", "finish"]),
                          st.integers(0, 4)), max_size=40))  # fmt: skip
def test_whatever_a_builder_reports_the_fraction_rises_from_0_to_1(events) -> None:
    phases, told = Phases(), []
    phases.start("root", None, 3)
    for name, what, number in events:
        if what == "start":
            told.append(phases.start(name, "root" if name == "a" else "a", number))
        elif what == "step":
            told.append(phases.step(name, number))
        else:
            phases.finish(name)
    fractions = [progress.fraction for progress in told if progress is not None]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert all(p.step <= p.steps for p in told if p is not None)
