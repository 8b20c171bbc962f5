"""A model that is open somewhere, and a run on this machine."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from msn_export.embed.decode import decode, read
from msn_export.embed.inference import batches
from msn_export.errors import ToleranceError
from msn_export.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msn_export.embed.inference import Reading, Rows
    from msn_export.embed.job import Listing
    from msn_export.feed import Feed
    from msn_export.manifest import Manifest
    from msn_export.runtime import Runner
    from msn_export.spec import BatchRange, TensorSpec


class OpenModel(Protocol):
    """What is known of an open model; a ``Runner`` is one."""

    @property
    def name(self) -> str:
        """What runs it, and on what."""

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the artifact; None where there is no manifest."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it gives."""

    @property
    def batch(self) -> BatchRange:
        """The batches it accepts."""


def require_selftest(runner: Runner, *, check: bool) -> str:
    """Run the manifest's golden input, before a night is spent on a model that is wrong here.

    Raises:
        ToleranceError: this machine does not reproduce it.
    """
    if not check:
        return "none (--no-check)"
    if runner.manifest is None or runner.manifest.golden is None:
        return "none: no golden input came with the model"
    found = runner.selftest()
    if not found.passed:
        raise ToleranceError(
            f"{found}: this machine does not compute what the model was checked for; export it "
            "here, or run it all the same with --no-check"
        )
    return str(found)


class LocalExecutor:
    """Pictures of a folder and a runner that is open here."""

    def __init__(
        self, listing: Listing, runner: Runner, selftest: str, workers: int | None
    ) -> None:
        self.pictures, self.model, self.selftest = listing, runner, selftest
        # one a core: decoders that are ahead of the model wait, and leave the core to it
        self.workers = workers or min(16, len(usable_cores()))
        self.cluster: str | None = None

    def rows(
        self, feed: Feed, reading: Reading, batch: int, missing: Sequence[range]
    ) -> Iterator[tuple[int, Rows]]:
        """Make the rows of each batch of ``missing``, in order; give them with the first's number.

        Raises:
            MsnExportError: the model failed.
        """
        paths = chain.from_iterable(self.pictures.paths[one.start : one.stop] for one in missing)
        decoded = decode(
            paths,
            partial(read, preprocessing=feed.preprocessing),
            workers=self.workers,
            ahead=2 * batch + self.workers,
        )
        size, channels = feed.preprocessing.size, feed.preprocessing.channels
        with closing(decoded):
            run = batches(
                decoded, size, channels, batch, lambda pixels: self.model(feed(pixels)), reading
            )
            for one, rows in zip(missing, run, strict=True):
                yield one.start, rows
