"""Importing a module in a process of its own survives whatever the module does."""

import pytest

from msn_export.commands.import_probe import probe


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("", None),
        ("raise ImportError('no luck')", "ImportError: no luck"),
        ("import os; os.abort()", "importing it ends the process (SIGABRT)"),
        ("import sys; sys.exit(3)", "it says nothing"),
        ("print('hello'); import sys; print('noise', file=sys.stderr)", None),
    ],
)
def test_a_probe_survives_whatever_a_module_does(code, fault, tmp_path, monkeypatch) -> None:
    (tmp_path / "suspect.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probe("suspect")
    assert found.fault is None if fault is None else found.fault.startswith(fault)


def test_a_probe_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    (tmp_path / "suspect.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("msn_export.commands.import_probe._TIMEOUT", 0.5)
    assert "takes more than" in (probe("suspect").fault or "")
