"""How many actors a cluster's machines hold, and what each may use: arithmetic, nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.errors import ClusterError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msn_export.embed.job import EmbedJob

# providers that need a GPU, however they are spelled
_ON_GPU = ("cuda", "tensorrt", "nvtensorrt")
# Batches of one task: few, for a lost machine loses its task, and many enough to outweigh Ray's own
# milliseconds. A task is a fiftieth of an actor's work at most.
_BATCHES, _TASKS_AN_ACTOR = 8, 50
_THREADS = 4  # of one actor on the CPU: more of them share one model, and gain less each


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster: what Ray may give out of it."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work.

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
        """What an actor has, in words."""
        return "1 GPU" if self.gpus else f"{self.cpus} CPU{'s' * (self.cpus > 1)}"

    def __str__(self) -> str:
        actors = f"{self.actors} actor{'s' * (self.actors > 1)} of {self.each}"
        return f"{actors}, {self.readers} reader{'s' * (self.readers > 1)}"


def crew_for(job: EmbedJob, nodes: Sequence[Node]) -> Crew:
    """Decide who works on a job.

    Raises:
        SpecError: the job names a GPU, or a number of threads, which is Ray's to choose.
        ClusterError: the cluster has no room.
    """
    if job.device is not None:
        raise SpecError("--device is for one machine: on a cluster Ray gives each actor its GPU")
    if job.threads is not None:
        raise SpecError("--threads is for one machine: on a cluster Ray gives an actor its CPUs")
    needs_gpu = None
    if job.model.suffix != ".onnx":
        needs_gpu = True
    elif job.providers:
        needs_gpu = any(name.lower().startswith(_ON_GPU) for name in job.providers)
    return crew_of(nodes, needs_gpu=needs_gpu, actors=job.actors)


def blocks_of(batches: int, actors: int) -> int:
    """Into how many tasks to divide the batches."""
    each = max(1, min(_BATCHES, batches // (actors * _TASKS_AN_ACTOR)))
    return -(-batches // each)


def crew_of(nodes: Sequence[Node], *, needs_gpu: bool | None, actors: int | None) -> Crew:
    """Decide who works on a cluster.

    Args:
        nodes: its machines.
        needs_gpu: True for a model that runs on a GPU alone, False for the CPU; None takes GPUs
            where there are some.
        actors: how many are to hold the model; None is as many as there is room for.

    Raises:
        ClusterError: the cluster has no room for one, or not for so many.
    """
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    if needs_gpu and not gpus:
        raise ClusterError(
            f"the model runs on a GPU and the cluster ({describe(nodes)}) has none; start nodes "
            "with GPUs, or embed with the .onnx and --providers cpu"
        )
    on_gpu = bool(gpus) if needs_gpu is None else needs_gpu
    if on_gpu:
        room, each = gpus, 0
    else:
        each = _threads(nodes)
        room = sum(_usable(node.cpus) // each for node in nodes)  # no actor spans machines
    if not room:
        raise ClusterError(f"the cluster ({describe(nodes)}) has no CPU to give; start nodes")
    if actors is not None and actors > room:
        raise ClusterError(
            f"--actors {actors}: the cluster ({describe(nodes)}) has room for {room}; give fewer "
            "or start more nodes"
        )
    count = actors or room
    readers = max(-(-count // 5), cpus - count * max(each, 1))
    return Crew(count, each, int(on_gpu), readers)


def _usable(cpus: int) -> int:
    """Leave a sixth of a machine, one processor at least, to decoding; a single one is shared."""
    return cpus - max(1, cpus // 6) if cpus > 1 else cpus


def _threads(nodes: Sequence[Node]) -> int:
    """Share each machine evenly: as many threads as the smallest machine can give."""
    least = min((_usable(node.cpus) for node in nodes if node.cpus), default=1)
    shares = -(-least // _THREADS)
    return max(1, least // shares)


def describe(nodes: Sequence[Node]) -> str:
    """Say in words what a cluster has."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    return f"{count}, {cpus} CPU{'s' * (cpus != 1)}, {gpus} GPU{'s' * (gpus != 1)}"
