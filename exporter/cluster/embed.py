"""``msn-export embed`` on Ray Data: read and decode, an actor pool with the model, rows back here.

A record is a batch, the same one that a run on a single machine makes: so the rows are the same.
Rows come back to the machine of the command, in the order in which they are done, and are kept
there: its journal is what a lost machine, a lost cluster and ``--resume`` go by, and no file system
but the pictures' has to be shared.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from msn_export.cluster.cluster import (
    Embedder,
    Opening,
    Reader,
    blocks_of,
    crew_for,
    describe,
    explore,
    failures_in_one_line,
    require_same,
)
from msn_export.cluster.storage import decode_rows, failure_to, pack
from msn_export.errors import ClusterError, MsnExportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msn_export.artifact import Feed
    from msn_export.cluster.cluster import Known, Node
    from msn_export.cluster.storage import Record, Store
    from msn_export.embedding.inference import Reading, Rows
    from msn_export.embedding.job import EmbedJob, PictureList

_FIND_PLACE = 600.0  # seconds until a worker has a place and the model is open
_STALLED = 900.0  # seconds without any batch: the cluster has no room for the job any more


class ShippedEmbedder(Embedder):
    """Takes the model out of Ray's object store, where it lies once a machine; fails in order."""

    def __init__(self, sent: list[Any], *others: Any) -> None:
        super().__init__(ray.get(sent[0]), *others)

    def __call__(self, record: Record) -> Record:
        """Run one batch; give its rows, or why there are none."""
        try:
            return self.run(record)
        except MsnExportError as error:
            return failure_to(error)


class OnCluster:
    """Pictures that a cluster reads and a model that its workers open."""

    embedder: type[ShippedEmbedder] = ShippedEmbedder

    def __init__(
        self, job: EmbedJob, pictures: PictureList, store: Store, nodes: Sequence[Node]
    ) -> None:
        self.pictures, self._store = pictures, store
        self._crew = crew_for(job, nodes)
        threads = self._crew.cpus if job.model.suffix == ".onnx" and self._crew.cpus else None
        self._opening = Opening(job.providers, threads, job.trust, job.check)
        self._cargo = ray.put(pack(job.model))
        self.model: Known = self._explore()
        self.selftest = self.model.selftest
        # a reader waits for a bucket more than it computes
        self._each = job.workers or (1 if store.filesystem is None else 4)
        self.workers = self._each * self._crew.readers
        self.cluster = f"{describe(nodes)}: {self._crew}"

    def _explore(self) -> Known:
        run = ray.remote(explore).options(**self._share())
        try:
            with failures_in_one_line():
                found: Known = ray.get(run.remote(self._cargo, self._opening), timeout=_FIND_PLACE)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"no worker with {self._crew.each} could open the model in {_FIND_PLACE:.0f} s; is "
                "the cluster busy with other jobs?"
            ) from error
        require_same(found)
        return found

    def _share(self) -> dict[str, int]:
        if self._crew.gpus:
            return {"num_cpus": 0, "num_gpus": 1}
        return {"num_cpus": self._crew.cpus}

    def rows(
        self, feed: Feed, reading: Reading, batch: int, missing: Sequence[range]
    ) -> Iterator[tuple[int, Rows]]:
        """Make the rows of each batch of ``missing``, in any order, each with its first row."""
        if not missing:
            return
        _quiet()
        blocks = blocks_of(len(missing), self._crew.actors)
        dataset = ray.data.from_items(list(self._records(missing)), override_num_blocks=blocks)
        dataset = dataset.map(
            Reader,
            fn_constructor_args=(self._store, feed.preprocessing, self._each, batch),
            compute=ActorPoolStrategy(size=self._crew.readers),
            num_cpus=0,
        )
        dataset = dataset.map(
            self.embedder,
            fn_constructor_args=([self._cargo], self._opening, self.model.name, feed, reading),
            compute=ActorPoolStrategy(size=self._crew.actors),
            **self._share(),
        )
        with failures_in_one_line():
            for record in dataset.iter_rows():
                yield decode_rows(record)

    def _records(self, missing: Sequence[range]) -> Iterator[dict[str, Any]]:
        for one in missing:
            paths = self.pictures.paths[one.start : one.stop]
            yield {"start": one.start, "sources": [os.fsencode(str(path)) for path in paths]}


def _quiet() -> None:
    """Leave the terminal to our progress; what Ray logs stands in its session's folder."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is told once, by us
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our error would be a text in one of Ray's
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = _STALLED
    # a machine that goes while its actor opens the model is no fault of the model
    context.max_consecutive_actor_init_deaths = 3
