"""How many actors a cluster holds: arithmetic, with room left for decoding."""

from pathlib import Path

import pytest

from msn_export.cluster.cluster import Node, blocks_of, describe, layout_of, plan_workers
from msn_export.embedding.job import EmbedJob
from msn_export.errors import ClusterError, SpecError


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([Node(1)], "1 actor of 1 CPU, 1 reader"),
        ([Node(2)], "1 actor of 1 CPU, 1 reader"),
        ([Node(8)], "2 actors of 3 CPUs, 2 readers"),
        ([Node(16)], "4 actors of 3 CPUs, 4 readers"),
        ([Node(2), Node(2)], "2 actors of 1 CPU, 2 readers"),
        ([Node(16), Node(4)], "5 actors of 3 CPUs, 5 readers"),
        ([Node(32, gpus=4)], "4 actors of 1 GPU, 28 readers"),
        ([Node(4, gpus=8)], "8 actors of 1 GPU, 2 readers"),
        ([Node(0), Node(2)], "1 actor of 1 CPU, 1 reader"),
    ],
)
def test_actors_never_take_what_the_readers_need(nodes, wanted) -> None:
    layout = layout_of(nodes, needs_gpu=None, actors=None)
    assert str(layout) == wanted
    assert layout.readers >= 1


@pytest.mark.parametrize("cpus", range(1, 130))
def test_a_machine_is_never_promised_twice(cpus) -> None:
    layout = layout_of([Node(cpus)], needs_gpu=False, actors=None)
    assert 1 <= layout.cpus <= 4
    assert layout.actors * layout.cpus <= max(1, cpus - 1)
    assert layout.actors * layout.cpus + layout.readers >= cpus  # and none of it stands idle


def test_fewer_actors_leave_more_readers() -> None:
    layout = layout_of([Node(16)], needs_gpu=False, actors=2)
    assert (layout.actors, layout.cpus, layout.readers) == (2, 3, 10)


def test_the_cpu_may_be_asked_for_where_there_are_gpus() -> None:
    layout = layout_of([Node(16, gpus=1)], needs_gpu=False, actors=None)
    assert (layout.gpus, layout.cpus) == (0, 3)


def test_what_there_is_no_room_for_is_refused() -> None:
    with pytest.raises(ClusterError) as refused:
        layout_of([Node(2)], needs_gpu=True, actors=None)
    assert str(refused.value) == (
        "the model runs on a GPU and the cluster (1 node, 2 CPUs, 0 GPUs) has none; start nodes "
        "with GPUs, or embed with the .onnx and --providers cpu"
    )
    with pytest.raises(ClusterError) as refused:
        layout_of([Node(8), Node(8)], needs_gpu=False, actors=5)
    assert str(refused.value) == (
        "--actors 5: the cluster (2 nodes, 16 CPUs, 0 GPUs) has room for 4; give fewer or start "
        "more nodes"
    )
    with pytest.raises(ClusterError) as refused:
        layout_of([Node(0)], needs_gpu=None, actors=None)
    assert str(refused.value) == (
        "the cluster (1 node, 0 CPUs, 0 GPUs) has no CPU to give; start nodes"
    )


def test_a_cluster_in_words() -> None:
    assert describe([]) == "0 nodes, 0 CPUs, 0 GPUs"
    assert describe([Node(1, 1)]) == "1 node, 1 CPU, 1 GPU"


def job(model: str, **options: object) -> EmbedJob:
    return EmbedJob(Path(model), Path("pictures"), Path("out.parquet"), **options)


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        (job("m.onnx"), 1),
        (job("m.onnx", providers=("cpu",)), 0),
        (job("m.onnx", providers=("CUDAExecutionProvider", "cpu")), 1),
        (job("m.onnx", providers=("tensorrt",)), 1),
        (job("m.engine"), 1),
    ],
)
def test_what_a_model_runs_on_decides_who_runs_it(asked, gpus) -> None:
    assert plan_workers(asked, [Node(8, gpus=2)]).gpus == gpus


def test_an_engine_and_a_provider_of_gpus_need_one() -> None:
    for asked in (job("m.engine"), job("m.onnx", providers=("cuda",))):
        with pytest.raises(ClusterError, match=r"^the model runs on a GPU and the cluster"):
            plan_workers(asked, [Node(8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": 1}, "--device is for one machine: on a cluster Ray gives each actor its GPU"),
        (
            {"threads": 2},
            "--threads is for one machine: on a cluster Ray gives an actor its CPUs",
        ),
    ],
)
def test_what_ray_gives_out_cannot_be_asked_for(options, message) -> None:
    with pytest.raises(SpecError) as refused:
        plan_workers(job("m.onnx", **options), [Node(8, gpus=2)])
    assert str(refused.value) == message


@pytest.mark.parametrize(("batches", "actors"), [(1, 1), (100, 1), (100, 8), (10**6, 16)])
def test_a_lost_task_is_little_and_every_actor_has_several(batches, actors) -> None:
    blocks = blocks_of(batches, actors)
    each = -(-batches // blocks)
    assert each <= 8
    assert each == 1 or each <= batches / actors / 50
