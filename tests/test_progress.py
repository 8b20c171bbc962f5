"""Whoever shows progress, the step runs; silence shows nothing."""

import pytest

from msn_export.progress import Progress, Silent


def test_silence_runs_the_step_and_lets_its_error_through(capsys) -> None:
    silent: Progress = Silent()
    with silent.step("work"):
        silent.advance(1, 2, "half")
    with pytest.raises(ValueError, match="no"), silent.step("work"):
        raise ValueError("no")
    assert capsys.readouterr() == ("", "")
