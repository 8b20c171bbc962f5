"""One pass of images through a lane: from and to the host, or in place on the GPU.

A batch that has to be padded is so with what lies behind its images: no image sees another, and
what comes of the padding is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.runtime.elements import OF_ONNX
from msn_export.runtime.tensor import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.runtime.arena import Arena, Lease
    from msn_export.runtime.batching import Piece
    from msn_export.runtime.dlpack import Borrowed
    from msn_export.runtime.lane import Lane
    from msn_export.spec import TensorSpec

_ALIGNED = 256  # bytes; what cuMemAlloc gives and TensorRT may count on


def pass_host(lane: Lane, images: NDArray[Any], pieces: Sequence[Piece]) -> dict[str, NDArray[Any]]:
    """Run images of the host; bfloat16 comes and goes as its bytes.

    Raises:
        DeviceError: CUDA or TensorRT refuses.
    """
    engine, staging, stream = lane.engine, lane.staging, lane.stream
    whole = {
        spec.name: np.empty((len(images), *_sizes(spec)), OF_ONNX[spec.dtype].storage)
        for spec in engine.outputs
    }
    for piece in pieces:
        rows = slice(piece.start, piece.start + piece.count)
        staging.upload(engine.input.name, images[rows], stream)
        lane.enqueue(piece.profile, piece.size, staging.addresses)
        for name in whole:
            staging.download(name, piece.count, stream)
        lane.gpu.synchronize(stream)
        for name, array in whole.items():
            staging.read(name, array[rows])
    return whole


def pass_gpu(
    arena: Arena, lane: Lane, images: Borrowed, pieces: Sequence[Piece], caller: int
) -> dict[str, Tensor]:
    """Run images that lie on the GPU; the outputs are made where they stay.

    Nothing is copied but what has to be padded or is not aligned.

    Args:
        arena: lends the memory for the outputs.
        lane: where to run.
        images: contiguous.
        pieces: the runs to make.
        caller: the stream on which the images are made and the outputs are used.

    Raises:
        DeviceError: CUDA or TensorRT refuses.
    """
    rows = max(piece.start + piece.size for piece in pieces)
    offsets, total = _layout(lane, rows)
    lease = arena.lend(total, caller)
    lane.gpu.record(lane.ready, caller)
    lane.gpu.wait(lane.stream, lane.ready)
    for piece in pieces:
        _run_in_place(lane, images, piece, lease.pointer, offsets)
    lease.written(lane.stream)
    lease.give_to(caller)
    return {
        spec.name: _tensor(spec, images, lease, lease.pointer + offsets[spec.name])
        for spec in lane.engine.outputs
    }


def _layout(lane: Lane, rows: int) -> tuple[dict[str, int], int]:
    """Place each output of so many rows in one block: offsets, and the size of the block."""
    offsets, total = {}, 0
    for spec in lane.engine.outputs:
        offsets[spec.name] = total
        total += -(-rows * lane.sizes[spec.name] // _ALIGNED) * _ALIGNED
    return offsets, total


def _run_in_place(
    lane: Lane, images: Borrowed, piece: Piece, block: int, offsets: dict[str, int]
) -> None:
    gpu, engine = lane.gpu, lane.engine
    name = engine.input.name
    source = images.pointer + piece.start * lane.sizes[name]
    addresses = {name: source}
    if piece.count != piece.size or source % _ALIGNED:
        addresses[name] = lane.staging.addresses[name]
        gpu.copy(addresses[name], source, piece.count * lane.sizes[name], lane.stream)
    moved = {}
    for spec in engine.outputs:
        target = block + offsets[spec.name] + piece.start * lane.sizes[spec.name]
        if target % _ALIGNED:
            moved[spec.name] = target
            target = lane.staging.addresses[spec.name]
        addresses[spec.name] = target
    lane.enqueue(piece.profile, piece.size, addresses)
    for name, target in moved.items():
        gpu.copy(target, addresses[name], piece.count * lane.sizes[name], lane.stream)


def _tensor(spec: TensorSpec, images: Borrowed, lease: Lease, pointer: int) -> Tensor:
    return Tensor(
        pointer,
        (images.shape[0], *_sizes(spec)),
        OF_ONNX[spec.dtype],
        images.device,
        lease,
        lease.give_to,
    )


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape[1:])
