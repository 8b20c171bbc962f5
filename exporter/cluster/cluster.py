"""``msn-export embed`` on Ray Data: actors that read and decode, actors with the model, rows back.

A record is a batch, the same one that a run on a single machine makes: so the rows are the same.
Rows come back to the machine of the command, in the order in which they are done, and are kept
there: its journal is what a lost machine, a lost cluster and ``--resume`` go by, and no file system
but the pictures' has to be shared. Ray is loaded when a cluster is joined.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from msn_export import __version__
from msn_export.cluster.storage import (
    decode_pixels,
    decode_rows,
    encode_failure,
    encode_pixels,
    encode_rows,
    first_line,
    pack,
    read_source,
    unpacked,
)
from msn_export.embedding.decode import Decoder
from msn_export.embedding.inference import OpenModel, read_rows, require_selftest, stack
from msn_export.errors import ClusterError, MissingPackageError, MsnExportError, SpecError
from msn_export.host import usable_cores
from msn_export.runtime import open_runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from msn_export.cluster.storage import ArtifactBytes, Record, Store
    from msn_export.embedding.inference import Reading, Rows
    from msn_export.embedding.job import EmbedJob, Listing
    from msn_export.feed import Feed
    from msn_export.preprocessing import Preprocessing
    from msn_export.runtime import Runner


@dataclass(frozen=True, slots=True)
class Opening:
    """Options that an actor opens the model with."""

    providers: tuple[str, ...] = ()
    threads: int | None = None
    trust: bool = False
    check: bool = True
    precision: str | None = None

    def open(self, artifact: ArtifactBytes) -> tuple[Runner, str]:
        """Open a model that was sent to this machine; give the result of its selftest too."""
        with unpacked(artifact) as path:
            runner = open_runner(
                path,
                providers=self.providers or None,
                trust=self.trust,
                threads=self.threads,
                precision=self.precision,
                eager_kernels=True,  # as without a cluster: the rows are the same
            )
        try:
            return runner, require_selftest(runner, check=self.check)
        except BaseException:
            runner.close()
            raise


def explore(artifact: ArtifactBytes, opening: Opening) -> OpenModel:
    """Open the model on one worker, before all of them do."""
    runner, selftest = opening.open(artifact)
    with runner:
        return OpenModel.of(runner, selftest)


def require_same(model: OpenModel) -> None:
    if model.version != __version__:
        raise ClusterError(
            f"a worker has msn-export {model.version} and this machine {__version__}; install "
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
        sources = [self._store.source(path) for path in record["sources"]]
        size, channels = self._preprocessing.size, self._preprocessing.channels
        return encode_pixels(record["start"], stack(list(self._decoder(sources)), size, channels))


class Embedder:
    """Holds the open model and runs batches of pixels."""

    def __init__(
        self, artifact: ArtifactBytes, opening: Opening, name: str, feed: Feed, reading: Reading
    ) -> None:
        self._runner, _ = opening.open(artifact)
        if self._runner.name != name:
            self._runner.close()
            raise ClusterError(
                f"{socket.gethostname()} runs the model by {self._runner.name}, another machine by "
                f"{name}: their rows would differ; give all the same packages and GPUs, or choose "
                "--providers"
            )
        self._feed, self._reading = feed, reading

    def run(self, record: Record) -> Record:
        start, pictures = decode_pixels(record)
        outputs = self._runner(self._feed(pictures.pixels))
        return encode_rows(start, read_rows(outputs, self._reading, pictures))


# providers that need a GPU, however they are spelled
_ON_GPU = ("cuda", "tensorrt", "nvtensorrt")
# Batches of one task: few, for a lost machine loses its task, and many enough to outweigh Ray's own
# milliseconds. A task is a fiftieth of an actor's work at most.
_BATCHES, _TASKS_AN_ACTOR = 8, 50
_THREADS = 4  # of one actor on the CPU: more of them share one model, and gain less each


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster: processors and GPUs that Ray may give out."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class WorkerLayout:
    """The actors of a run.

    ``actors`` hold the model, each with ``cpus`` processors (and as many threads) or ``gpus``
    graphics processors; ``readers`` decode. Readers are asked of Ray with no processor at all and
    are counted here instead: after a machine was lost, actors that wait for a processor can never
    leave the readers without one, which would hang the job without an error.
    """

    actors: int
    cpus: int
    gpus: int
    readers: int

    @property
    def each(self) -> str:
        return "1 GPU" if self.gpus else f"{self.cpus} CPU{'s' * (self.cpus > 1)}"

    def __str__(self) -> str:
        actors = f"{self.actors} actor{'s' * (self.actors > 1)} of {self.each}"
        return f"{actors}, {self.readers} reader{'s' * (self.readers > 1)}"


def plan_workers(job: EmbedJob, nodes: Sequence[Node]) -> WorkerLayout:
    if job.device is not None:
        raise SpecError("--device is for one machine: on a cluster Ray gives each actor its GPU")
    if job.threads is not None:
        raise SpecError("--threads is for one machine: on a cluster Ray gives an actor its CPUs")
    needs_gpu = None
    if job.model.suffix != ".onnx":
        needs_gpu = True
    elif job.providers:
        needs_gpu = any(name.lower().startswith(_ON_GPU) for name in job.providers)
    return layout_of(nodes, needs_gpu=needs_gpu, actors=job.actors)


def blocks_of(batches: int, actors: int) -> int:
    """Number of tasks to divide the batches into."""
    each = max(1, min(_BATCHES, batches // (actors * _TASKS_AN_ACTOR)))
    return -(-batches // each)


def layout_of(nodes: Sequence[Node], *, needs_gpu: bool | None, actors: int | None) -> WorkerLayout:
    """Plan the actors of a cluster.

    Args:
        nodes: its machines.
        needs_gpu: True for a model that runs on a GPU alone, False for the CPU; None takes GPUs
            where there are some.
        actors: how many are to hold the model; None is as many as there is room for.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if needs_gpu and not gpus:
        raise ClusterError(
            f"the model runs on a GPU and the cluster ({describe(nodes)}) has none; start nodes "
            "with GPUs, or embed with the .onnx and --providers cpu"
        )
    on_gpu = bool(gpus) if needs_gpu is None else needs_gpu
    if on_gpu:
        most, each = gpus, 0
    else:
        each = _threads(nodes)
        most = sum(_usable(node.cpus) // each for node in nodes)  # no actor spans machines
    if not most:
        raise ClusterError(f"the cluster ({describe(nodes)}) has no CPU to give; start nodes")
    if actors is not None and actors > most:
        raise ClusterError(
            f"--actors {actors}: the cluster ({describe(nodes)}) has room for {most}; give fewer "
            "or start more nodes"
        )
    count = actors or most
    readers = max(-(-count // 5), cpus - count * max(each, 1))
    return WorkerLayout(count, each, int(on_gpu), readers)


def _usable(cpus: int) -> int:
    """Leave a sixth of a machine, one processor at least, to decoding; a single one is shared."""
    return cpus - max(1, cpus // 6) if cpus > 1 else cpus


def _threads(nodes: Sequence[Node]) -> int:
    """Share each machine evenly: as many threads as the smallest machine can give."""
    least = min((_usable(node.cpus) for node in nodes if node.cpus), default=1)
    shares = -(-least // _THREADS)
    return max(1, least // shares)


def describe(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    return f"{count}, {cpus} CPU{'s' * (cpus != 1)}, {gpus} GPU{'s' * (gpus != 1)}"


LOCAL = "local"
_ANSWER = 10.0  # seconds until a cluster's machine takes a connection
# Ray Data 2.60 adds this, and advice on its settings, to the message of whatever was raised
_REMARK = re.compile(r"\nFailed to .* after \d+/\d+ attempts.*", re.DOTALL)


def address_of(given: str, variables: Mapping[str, str] = os.environ) -> str:
    """Read the value of ``--ray``; empty is the cluster a submitted job runs in, else local."""
    # never None: Ray would then join whatever cluster was started last, or look for a dead one
    address = given or variables.get("RAY_ADDRESS") or LOCAL
    if "://" in address:
        raise ClusterError(
            f"--ray {address}: Ray Data runs inside the cluster; give HOST:PORT on one of its "
            "machines, or submit the command with ray job submit"
        )
    host, _, port = address.rpartition(":")
    if address not in {LOCAL, "auto"} and not (host and port.isdigit()):
        raise ClusterError(f"--ray {address}: expected HOST:PORT, auto, or local")
    return address


@contextmanager
def connected(address: str) -> Iterator[tuple[Node, ...]]:
    """Join a cluster, or start one on this machine; give its nodes. It is left at the end."""
    # before Ray is imported: it reports its use to its makers unless it is told not to
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackageError(
            f"--ray needs Ray Data ({error}); pip install 'msn-export[ray]'"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": len(usable_cores()), "include_dashboard": False}
    try:
        _require_answer(address)
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"--ray {address}: no cluster that can be joined ({first_line(error)}); start one "
            "with ray start --head, use --ray local, or set RAY_AUTH_MODE=token if it asks for one"
        ) from error
    try:
        with failures_in_one_line():
            resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield tuple(Node(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in resources)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Require that the address takes a connection: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()


@contextmanager
def failures_in_one_line() -> Iterator[None]:
    """Give an error of ours that was raised on another machine as it was raised there."""
    from ray.exceptions import RayError

    try:
        yield
    except (MsnExportError, RayError, RuntimeError, ImportError) as error:
        own = own_error_in(error)
        if own is error:
            raise
        if own is not None:
            raise own from error
        raise ClusterError(f"Ray failed: {first_line(error)}") from error


def own_error_in(error: BaseException) -> MsnExportError | None:
    """Find our error among the causes of one of Ray's, whose message is a whole traceback."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        # Ray's own subclass of our error has its remote traceback for a message
        if isinstance(one, MsnExportError) and not hasattr(one, "cause"):
            text, remark = _REMARK.subn("", Exception.__str__(one))  # its own has no line breaks
            return type(one)(text) if remark else one
        waiting += [getattr(one, "cause", None), one.__cause__, one.__context__]
    return None


_FIND_PLACE = 600.0  # seconds until a worker is free and the model is open
_STALLED = 900.0  # seconds without any batch: the cluster has no room for the job any more


class ShippedEmbedder(Embedder):
    """Takes the model out of Ray's object store, where it lies once a machine; fails in order."""

    def __init__(self, sent: list[Any], *others: Any) -> None:
        import ray

        super().__init__(ray.get(sent[0]), *others)

    def __call__(self, record: Record) -> Record:
        """Run one batch; give its rows, or the reason why there are none."""
        try:
            return self.run(record)
        except MsnExportError as error:
            return encode_failure(error)


class RayExecutor:
    """Embeds pictures that a cluster reads, with a model that its workers open."""

    embedder: type[ShippedEmbedder] = ShippedEmbedder

    def __init__(
        self, job: EmbedJob, pictures: Listing, store: Store, nodes: Sequence[Node]
    ) -> None:
        import ray

        self.pictures, self._store = pictures, store
        self._layout = plan_workers(job, nodes)
        threads = self._layout.cpus if job.model.suffix == ".onnx" and self._layout.cpus else None
        self._opening = Opening(job.providers, threads, job.trust, job.check, job.precision)
        self._artifact = ray.put(pack(job.model))
        self.model = self._explore()
        # a reader waits for a bucket more than it computes
        self._each = job.workers or (1 if store.filesystem is None else 4)
        self.workers = self._each * self._layout.readers
        self.cluster = f"{describe(nodes)}: {self._layout}"

    def _explore(self) -> OpenModel:
        import ray

        run = ray.remote(explore).options(**self._share())
        try:
            with failures_in_one_line():
                found: OpenModel = ray.get(
                    run.remote(self._artifact, self._opening), timeout=_FIND_PLACE
                )
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"no worker with {self._layout.each} could open the model in {_FIND_PLACE:.0f} s; "
                "is the cluster busy with other jobs?"
            ) from error
        require_same(found)
        return found

    def _share(self) -> dict[str, int]:
        if self._layout.gpus:
            return {"num_cpus": 0, "num_gpus": 1}
        return {"num_cpus": self._layout.cpus}

    def rows(
        self, feed: Feed, reading: Reading, batch: int, missing: Sequence[range]
    ) -> Iterator[tuple[int, Rows]]:
        """Make the rows of each batch of ``missing``, in any order, each with its first row."""
        import ray.data
        from ray.data import ActorPoolStrategy

        if not missing:
            return
        _quiet()
        blocks = blocks_of(len(missing), self._layout.actors)
        records: list[Record] = []
        for one in missing:
            paths = self.pictures.paths[one.start : one.stop]
            sources = [os.fsencode(str(path)) for path in paths]
            records.append({"start": one.start, "sources": sources})
        dataset = ray.data.from_items(records, override_num_blocks=blocks)
        dataset = dataset.map(
            Reader,
            fn_constructor_args=(self._store, feed.preprocessing, self._each, batch),
            compute=ActorPoolStrategy(size=self._layout.readers),
            num_cpus=0,
        )
        dataset = dataset.map(
            self.embedder,
            fn_constructor_args=([self._artifact], self._opening, self.model.name, feed, reading),
            compute=ActorPoolStrategy(size=self._layout.actors),
            **self._share(),
        )
        with failures_in_one_line():
            for record in dataset.iter_rows():
                yield decode_rows(record)


def _quiet() -> None:
    """Leave the terminal to our progress; what Ray logs stands in its session's folder."""
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # a failure is reported once, by us
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else our error would be a text in one of Ray's
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = _STALLED
    # a machine that goes while its actor opens the model is no fault of the model
    context.max_consecutive_actor_init_deaths = 3
