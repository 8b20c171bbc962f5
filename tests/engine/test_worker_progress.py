"""Nested phases of a builder are one fraction, which its monitor reports."""

import time
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from msn_export.engine import worker
from msn_export.engine.options import BuildStep
from msn_export.engine.worker import Phases, make_monitor

# What the real module's class is to its subclass: a base with an __init__
TRT = SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {}))


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


def test_a_listener_that_is_gone_cancels_the_build() -> None:
    answers = iter([True, True, False])
    monitor = make_monitor(TRT, lambda _progress: next(answers))
    monitor.phase_start("build", None, 3)
    monitor.phase_start("optimise", "build", 2)
    assert monitor.step_complete("optimise", 0) is True  # so soon that it is not told
    assert monitor.step_complete("unheard of", 0) is True
    assert monitor.step_complete("build", 0) is False


def test_one_phase_is_not_told_more_often_than_an_eye_sees(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[BuildStep] = []
    monitor = make_monitor(TRT, lambda progress: told.append(progress) or True)
    monitor.phase_start("build", None, 100)
    for step in range(100):
        now[0] += worker._INTERVAL / 10
        assert monitor.step_complete("build", step) is True
    assert len(told) in {10, 11}
    monitor.phase_finish("build")
