"""Where ``msn-export embed`` runs: on this machine, or on a Ray cluster."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msn_export.cluster.connect import LOCAL, address_of, connected
from msn_export.cluster.sources import list_sources
from msn_export.embed.listing import list_pictures
from msn_export.embed.local import Local
from msn_export.embed.opened import tested
from msn_export.errors import SpecError
from msn_export.runtime import open_runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msn_export.embed.batches import Reading
    from msn_export.embed.job import EmbedJob
    from msn_export.embed.listing import Pictures
    from msn_export.embed.opened import Opened
    from msn_export.embed.rows import Rows
    from msn_export.feed import Feed
    from msn_export.progress import Progress


class Place(Protocol):
    """Where a job runs: the pictures it found there, the model that is open there."""

    @property
    def pictures(self) -> Pictures:
        """What there is to run."""

    @property
    def model(self) -> Opened:
        """What is known of the model."""

    @property
    def selftest(self) -> str:
        """What the model's golden input said there."""

    @property
    def workers(self) -> int:
        """Processes that decode."""

    @property
    def cluster(self) -> str | None:
        """What the cluster has, in words; None on this machine."""

    def rows(
        self, feed: Feed, reading: Reading, batch: int, missing: Sequence[range]
    ) -> Iterator[tuple[int, Rows]]:
        """Make the rows of each batch of ``missing``; give them with the number of the first."""


@contextmanager
def here(job: EmbedJob, progress: Progress) -> Iterator[Place]:
    """Open the model on this machine."""
    if not isinstance(job.images, Path):
        raise SpecError(
            f"{job.images} is read on a Ray cluster alone; add --ray local, or copy it to a folder"
        )
    if job.actors is not None:
        raise SpecError("--actors is of a Ray cluster; add --ray, or leave it out")
    if job.threads is not None and job.model.suffix != ".onnx":
        raise SpecError(f"--threads is for graphs on a CPU, and {job.model} is an engine")
    with progress.step("list pictures"):
        listing = list_pictures(job.images)
    with progress.step("open the model"):
        runner = open_runner(
            job.model,
            device=job.device,
            providers=job.providers or None,
            trust=job.trust,
            threads=job.threads,
            eager_kernels=True,  # a row does not depend on which kernels were ready
        )
    with runner:
        with progress.step("selftest"):
            selftest = tested(runner, check=job.check)
        yield Local(listing, runner, selftest, job.workers)


@contextmanager
def on_cluster(job: EmbedJob, progress: Progress) -> Iterator[Place]:
    """Join or start a cluster, and have one of its workers open the model."""
    address = address_of(job.ray or "")
    with progress.step("list pictures"):
        pictures, store = list_sources(job.images)
    with ExitStack() as stack:
        with progress.step(f"start Ray on {address}" if address == LOCAL else f"join {address}"):
            nodes = stack.enter_context(connected(address))
        from msn_export.cluster.embed import OnCluster  # loads Ray, which is there by now

        with progress.step("open the model on a worker"):
            place = OnCluster(job, pictures, store, nodes)
        yield place
