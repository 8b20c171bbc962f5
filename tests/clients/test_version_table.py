"""Every cell of the version table that was run says what a run says: ``make clients``."""

import contextlib
import sys

import clients
import pytest
import version_table as script

from msn_export.spec import Target
from msn_export.version_table import Client, table

pytestmark = pytest.mark.slow

RUN = [
    (client, target, dtype)
    for client in Client
    if client in clients.CLIENTS
    for target in Target
    for dtype in table()[target]
]


@pytest.fixture(scope="module")
def trials() -> script.Trials:
    script.write_graphs()
    return script.Trials([sys.executable])


@pytest.mark.parametrize(("client", "target", "dtype"), RUN)
def test_a_cell_is_what_runs_say(trials, client, target, dtype) -> None:
    """In the version named it runs, in the one before it, where that installs here, it does not."""
    cell = table()[target][dtype][client]
    failing = cell.newest if cell.least is None else cell.before
    ran = {}
    for version, fails in ((failing, True), (cell.least, False)):
        with contextlib.suppress(script.UntriedError):
            if version is not None:
                ran[version] = (trials(client, version, target, dtype) is not None, fails)
    if not ran:
        pytest.skip(f"neither {failing} nor {cell.least} installs for this Python")
    assert all(failed is fails for failed, fails in ran.values()), ran
