"""A run on this machine: decode ahead in processes, run in this one."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from msn_export.embed.batches import batches
from msn_export.embed.decode import decode, read
from msn_export.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msn_export.embed.batches import Reading
    from msn_export.embed.listing import Listing
    from msn_export.embed.rows import Rows
    from msn_export.feed import Feed
    from msn_export.runtime import Runner


class Local:
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
