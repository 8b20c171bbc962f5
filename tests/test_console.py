"""Progress in a log: a line now and then, where a terminal has a bar."""

from msn_export.cli import console


def test_a_long_step_tells_a_log_how_far_it_is(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_TELL", 0.0)
    with console.Console(as_json=True).progress() as progress, progress.step("embed"):
        progress.advance(1, 10, "1 of 10, 2.0/s")
        progress.advance(2, 10)  # nothing to say
    told = capsys.readouterr()
    assert told.out == ""
    assert "1 of 10, 2.0/s" in told.err
    assert "embed" in told.err


def test_but_not_with_every_step(capsys) -> None:
    with console.Console(as_json=True).progress() as progress, progress.step("embed"):
        progress.advance(1, 10, "1 of 10")
    assert "1 of 10" not in capsys.readouterr().err
