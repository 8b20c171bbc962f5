"""Open an artifact with its residual stream shown: stage by stage, and inside one block."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from msn_export.artifact import Artifact
from msn_export.compare.sides import OpenSide, heads_of, open_engine
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.blocks import ENTRY, TENSORS, Stream, find_stream, stages_of
from msn_export.graph.blocks import tensors_of as tensors_inside
from msn_export.graph.builder import GIVEN, MARK, mark_outputs, with_inputs
from msn_export.graph.emulate import emulate_bf16, has_bf16
from msn_export.graph.precision import MAXIMA, observe
from msn_export.mixed_precision import cpu_runner
from msn_export.runtime.onnxruntime import open_session, translated
from msn_export.runtime.providers import CPU
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from msn_export.metrics.diagnose import StreamLike, Tensors


@dataclass(frozen=True, slots=True)
class Shown:
    """The tensors that an artifact can show.

    ``stages`` are in order, each with its sizes but the batch, None where one is not known;
    ``inside`` gives each block's tensors, each with all its names.
    """

    stages: Mapping[str, tuple[int | None, ...] | None]
    inside: Mapping[str, tuple[tuple[str, ...], ...]]


class OnnxStream:
    """An ONNX graph with chosen tensors as outputs.

    ``peaks`` says which values to follow, each with its stage: the largest of each is kept.
    """

    def __init__(
        self,
        model: ir.Model,
        shown: Mapping[str, ir.Value],
        dtype: Dtype,
        peaks: Mapping[str, str] | None = None,
    ) -> None:
        self.peaks: dict[str, tuple[float, str]] = {}
        self._stages: tuple[tuple[str, str], ...] = ()
        if peaks is not None:
            observed = observe(model)
            model, stage_of = observed.model, peaks
            self._stages = tuple((name, stage_of.get(name, "")) for name in observed.names)
        with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
            path = Path(folder) / "exposed.onnx"
            io.save(mark_outputs(model, shown), path)
            self._runner: OpenSide = cpu_runner(path, dtype, Path(folder))
        self.name = self._runner.name

    def __call__(self, images: NDArray[Any], given: Tensors | None = None) -> Tensors:
        assert not given  # it takes images alone
        outputs = self._runner(images)
        if self._stages:
            self._raise_peaks(np.asarray(outputs[MAXIMA]))
        return _seen(outputs)

    def close(self) -> None:
        self._runner.close()

    def _raise_peaks(self, maxima: NDArray[Any]) -> None:
        for (tensor, stage), peak in zip(self._stages, maxima.tolist(), strict=True):
            if stage and (stage not in self.peaks or not peak <= self.peaks[stage][0]):
                self.peaks[stage] = (peak, tensor)


class OnnxBlocks:
    """An ONNX graph whose stages each read what is given for the stage before, not what came out.

    bf16 is emulated.

    Args:
        model: a graph whose values are typed.
        shown: what comes out, by name.
        given: the stages that must be given with every batch.
    """

    def __init__(
        self,
        model: ir.Model,
        shown: Mapping[str, ir.Value],
        given: Mapping[str, ir.Value],
    ) -> None:
        self.peaks: dict[str, tuple[float, str]] = {}
        self._tokens = {name: _sizes(value) for name, value in given.items()}
        fed = mark_outputs(with_inputs(model, given), shown)
        emulated = has_bf16(fed)
        with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
            path = Path(folder) / "fed.onnx"
            io.save(emulate_bf16(fed) if emulated else fed, path)
            self._session: Any = open_session(path, [(CPU, {})], None)
        (self._images,) = [
            taken.name for taken in self._session.get_inputs() if not taken.name.startswith(GIVEN)
        ]
        self._names = [f"{MARK}{name}" for name in shown]
        self.name = f"onnxruntime, {CPU}"

    def __call__(self, images: NDArray[Any], given: Tensors | None = None) -> Tensors:
        fed = {
            f"{GIVEN}{name}": _at(np.asarray((given or {})[name], np.float32), sizes)
            for name, sizes in self._tokens.items()
        }
        with translated():
            outputs = self._session.run(self._names, {self._images: images, **fed})
        return _seen(dict(zip(self._names, outputs, strict=True)))

    def close(self) -> None:
        self._session = None


class EngineStream:
    """An engine that was built with its stages as outputs."""

    def __init__(self, marked: Path) -> None:
        self.peaks: dict[str, tuple[float, str]] = {}
        self._runner = open_engine(marked)
        self.name = f"{self._runner.name}, built once more with its blocks shown"

    def __call__(self, images: NDArray[Any], given: Tensors | None = None) -> Tensors:
        assert not given  # it takes images alone
        outputs = self._runner(images)
        return {name.removeprefix(MARK): np.asarray(value) for name, value in outputs.items()}

    def close(self) -> None:
        self._runner.close()


def _seen(outputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(MARK): np.asarray(value)
        for name, value in outputs.items()
        if name.startswith(MARK)
    }


def _sizes(value: ir.Value) -> tuple[int | None, ...] | None:
    """Give a value's sizes but the batch, None where one is not known."""
    if value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)[1:]


def _at(stream: NDArray[np.float32], sizes: tuple[int | None, ...] | None) -> NDArray[np.float32]:
    """Give a stream [b, n, dim] the tokens that its reader takes.

    Where either side has [CLS] alone, all that is read of the stream is [CLS].
    """
    wanted = sizes[0] if sizes else None
    if wanted is None or stream.ndim != 3 or stream.shape[1] == wanted:
        return stream
    first = stream[:, :1]
    return np.ascontiguousarray(first if wanted == 1 else np.repeat(first, wanted, axis=1))


def what_is_shown(artifact: Artifact) -> Shown:
    """List what can be shown of an artifact, without running it."""
    if artifact.marked is not None:
        assert artifact.marked.manifest is not None  # written with the engine
        specs = {
            spec.name.removeprefix(MARK): spec.shape[1:]
            for spec in artifact.marked.manifest.outputs
        }
        stages = {
            name: tuple(size if isinstance(size, int) else None for size in shape)
            for name, shape in specs.items()
            if name == ENTRY or name.startswith("block ")
        }
        return Shown(stages, dict.fromkeys(list(stages)[1:], ()))
    if artifact.module is not None:
        config, numbers = artifact.module.config, range(len(artifact.module.blocks))
        inside = {f"block {i}": tuple(place.names(i) for place in TENSORS) for i in numbers}
        return Shown(dict.fromkeys((ENTRY, *inside), (config.sequence, config.dim)), inside)
    inside = {
        f"block {block.number}": tuple(names for names, _ in tensors_inside(block))
        for block in artifact.stream.blocks
    }
    sizes = {name: _sizes(value) for name, value in stages_of(artifact.stream).items()}
    return Shown(sizes, inside)


def open_stream(
    artifact: Artifact,
    outputs: tuple[str, ...],
    names: tuple[str, ...],
    *,
    peaks: bool = False,
    exact: bool = False,
) -> StreamLike:
    """Open an artifact with those of the tensors called ``names`` shown that it has.

    A checkpoint can be had in fp64 too.
    """
    if artifact.marked is not None:
        return EngineStream(artifact.marked.path)
    if artifact.module is not None:
        from msn_export.graph.torch_reference import TorchStream

        return TorchStream(artifact.module, heads_of(outputs), names, exact=exact)
    model, stream = _shown_graph(artifact)
    values = values_of(model, stream)
    shown = {name: values[name] for name in names if name in values}
    return OnnxStream(model, shown, artifact.dtype, _stage_by_value(stream) if peaks else None)


def open_blocks(
    artifact: Artifact, outputs: tuple[str, ...], names: tuple[str, ...], given: tuple[str, ...]
) -> StreamLike:
    """Open an artifact so that each stage reads what is given for the one before it."""
    if artifact.module is not None:
        return open_stream(artifact, outputs, names)
    return blocks_of(*_shown_graph(artifact), names, given)


def blocks_of(
    model: ir.Model, stream: Stream | None, names: tuple[str, ...], given: tuple[str, ...]
) -> OnnxBlocks:
    """Open a graph in the same way."""
    values = values_of(model, stream)
    shown = {name: values[name] for name in names if name in values}
    return OnnxBlocks(model, shown, {name: values[name] for name in given})


def stream_of(model: ir.Model) -> Stream | None:
    """Find the stream of a graph that was written here; None where there is none."""
    try:
        return find_stream(model)
    except GraphError:
        return None


def _shown_graph(artifact: Artifact) -> tuple[ir.Model, Stream | None]:
    assert artifact.graph is not None  # an engine shows nothing unless it is a marked one
    with suppress(GraphError):
        return artifact.graph, artifact.stream
    return artifact.graph, None


def values_of(model: ir.Model, stream: Stream | None) -> dict[str, ir.Value]:
    """Name what a graph can show: stages, tensors inside blocks, outputs.

    Of a graph without a residual stream, its outputs.
    """
    values = {}
    if stream is not None:
        values = stages_of(stream)
        for block in stream.blocks:
            for names, value in tensors_inside(block):
                values |= dict.fromkeys(names, value)
    return values | {value.name or "": value for value in model.graph.outputs}


def _stage_by_value(stream: Stream | None) -> dict[str, str]:
    """Assign each value to the stage that computes it."""
    return {
        value.name or "": f"block {block.number}"
        for block in (stream.blocks if stream is not None else ())
        for node in block.nodes
        for value in node.outputs
    }
