"""What several contracts share."""

from collections.abc import Iterator

import pytest

from tests.builders.fork_server import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """A process that has imported everything: a command in it begins at once."""
    with ForkServer() as running:
        yield running
