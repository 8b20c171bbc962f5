"""What the actors do: readers decode, embedders hold the model. Plain classes, nothing of Ray."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from msn_export import __version__
from msn_export.cluster.storage import encode, pixels_from, pixels_to, read_source, unpacked
from msn_export.embed.decode import Decoder
from msn_export.embed.inference import read_rows, stack
from msn_export.embed.local import require_selftest
from msn_export.errors import ClusterError
from msn_export.runtime import open_runner

if TYPE_CHECKING:
    from msn_export.cluster.storage import ArtifactBytes, Record, Store
    from msn_export.embed.inference import Reading
    from msn_export.feed import Feed
    from msn_export.manifest import Manifest
    from msn_export.preprocessing import Preprocessing
    from msn_export.runtime import Runner
    from msn_export.spec import BatchRange, TensorSpec


@dataclass(frozen=True, slots=True)
class Opening:
    """How an actor opens the model."""

    providers: tuple[str, ...] = ()
    threads: int | None = None
    trust: bool = False
    check: bool = True

    def open(self, cargo: ArtifactBytes) -> tuple[Runner, str]:
        """Open a model that was sent here; give what its selftest said too.

        Raises:
            MsnExportError: it cannot run here.
        """
        with unpacked(cargo) as path:
            runner = open_runner(
                path,
                providers=self.providers or None,
                trust=self.trust,
                threads=self.threads,
                eager_kernels=True,  # as without a cluster: the rows are the same
            )
        try:
            return runner, require_selftest(runner, check=self.check)
        except BaseException:
            runner.close()
            raise


@dataclass(frozen=True, slots=True)
class Known:
    """What a worker found out about the model; ``version`` is its msn-export."""

    name: str
    manifest: Manifest | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchRange
    selftest: str
    version: str


def explore(cargo: ArtifactBytes, opening: Opening) -> Known:
    """Open the model on one worker, before all of them do.

    Raises:
        MsnExportError: it cannot run there.
    """
    runner, selftest = opening.open(cargo)
    with runner:
        return Known(
            runner.name,
            runner.manifest,
            runner.inputs,
            runner.outputs,
            runner.batch,
            selftest,
            __version__,
        )


def require_same(known: Known) -> None:
    """Require that a worker is of this msn-export.

    Raises:
        ClusterError: it is of another.
    """
    if known.version != __version__:
        raise ClusterError(
            f"a worker has msn-export {known.version} and this machine {__version__}; install "
            "the same everywhere"
        )


class Reader:
    """Decodes batches of pictures in processes of its own, which a hostile picture may end."""

    def __init__(
        self, store: Store, preprocessing: Preprocessing, workers: int, batch: int
    ) -> None:
        self._store, self._preprocessing = store, preprocessing
        read = partial(read_source, store=store, preprocessing=preprocessing)
        self._decoder = Decoder(read, workers=workers, ahead=batch)

    def __call__(self, record: Record) -> Record:
        """Decode the sources of one batch.

        Raises:
            ClusterError: the store of the pictures failed.
        """
        sources = [self._store.source(path) for path in record["sources"]]
        known = self._preprocessing
        pixels, errors, turned = stack(list(self._decoder(sources)), known.size, known.channels)
        return pixels_to(record["start"], pixels, errors, turned)


class Embedder:
    """Holds the open model and runs batches of pixels.

    Raises:
        ClusterError: this machine runs the model by something else than the first one did.
        MsnExportError: the model cannot run here.
    """

    def __init__(
        self, cargo: ArtifactBytes, opening: Opening, name: str, feed: Feed, reading: Reading
    ) -> None:
        self._runner, _ = opening.open(cargo)
        if self._runner.name != name:
            raise ClusterError(
                f"{socket.gethostname()} runs the model by {self._runner.name}, another machine by "
                f"{name}: their rows would differ; give all the same packages and GPUs, or choose "
                "--providers"
            )
        self._feed, self._reading = feed, reading

    def run(self, record: Record) -> Record:
        """Run one batch.

        Raises:
            MsnExportError: the model failed.
        """
        start, pixels, errors, turned = pixels_from(record)
        outputs = self._runner(self._feed(pixels))
        return encode(start, read_rows(outputs, self._reading, len(pixels), errors, turned))
