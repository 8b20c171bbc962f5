"""Open an artifact with its residual stream shown: stage by stage, and inside one block."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.expose import SEEN, expose
from msn_export.graph.inside import PLACES
from msn_export.graph.inside import inside as tensors_inside
from msn_export.graph.islands import MAXIMA, observe
from msn_export.graph.stream import ENTRY, find_stream, stages_of
from msn_export.graph.stream import Stream as Skeleton
from msn_export.proof.artifact import Artifact, Opened, open_engine
from msn_export.spec import Dtype, Head
from msn_export.typed import cpu_runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from msn_export.check.drift import Stream


@dataclass(frozen=True, slots=True)
class Shown:
    """What can be shown of an artifact.

    ``stages`` are in order; ``inside`` gives each block's tensors, each with all its names.
    """

    stages: tuple[str, ...]
    inside: Mapping[str, tuple[tuple[str, ...], ...]]


class OnnxStream:
    """An ONNX graph with chosen tensors as outputs; with ``peaks`` the largest values by stage."""

    def __init__(
        self, model: ir.Model, shown: Mapping[str, ir.Value], dtype: Dtype, *, peaks: bool
    ) -> None:
        self.peaks: dict[str, tuple[float, str]] = {}
        self._stages: tuple[tuple[str, str], ...] = ()
        if peaks:
            observed = observe(model)
            model, stage_of = observed.model, _stage_of(model)
            self._stages = tuple((name, stage_of.get(name, "")) for name in observed.names)
        with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
            path = Path(folder) / "exposed.onnx"
            io.save(expose(model, shown), path)
            self._runner: Opened = cpu_runner(path, dtype, Path(folder))
        self.name = self._runner.name

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run a batch in the graph's own input type."""
        outputs = self._runner(images)
        if self._stages:
            self._raise_peaks(np.asarray(outputs[MAXIMA]))
        return {
            name.removeprefix(SEEN): np.asarray(value)
            for name, value in outputs.items()
            if name.startswith(SEEN)
        }

    def close(self) -> None:
        """Free the session."""
        self._runner.close()

    def _raise_peaks(self, maxima: NDArray[Any]) -> None:
        for (tensor, stage), peak in zip(self._stages, maxima.tolist(), strict=True):
            if stage and (stage not in self.peaks or not peak <= self.peaks[stage][0]):
                self.peaks[stage] = (peak, tensor)


class EngineStream:
    """An engine that was built with its stages as outputs."""

    def __init__(self, marked: Path) -> None:
        self.peaks: dict[str, tuple[float, str]] = {}
        self._runner = open_engine(marked)
        self.name = f"{self._runner.name}, built once more with its blocks shown"

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run a batch in the engine's own input type."""
        outputs = self._runner(images)
        return {name.removeprefix(SEEN): np.asarray(value) for name, value in outputs.items()}

    def close(self) -> None:
        """Free the engine."""
        self._runner.close()


def what_is_shown(artifact: Artifact, outputs: tuple[str, ...]) -> Shown:
    """List what can be shown of an artifact, without running it.

    Raises:
        GraphError: its graph has no residual stream, or it is an engine.
    """
    if artifact.marked is not None:
        manifest = manifests.read(artifact.marked)
        assert manifest is not None  # written with the engine
        specs = [spec.name.removeprefix(SEEN) for spec in manifest.outputs]
        stages = [name for name in specs if name == ENTRY or name.startswith("block ")]
        return Shown((*stages, *outputs), dict.fromkeys(stages[1:], ()))
    if artifact.module is not None:
        numbers = range(len(artifact.module.blocks))
        inside = {f"block {i}": tuple(place.names(i) for place in PLACES) for i in numbers}
    else:
        inside = {
            f"block {block.number}": tuple(names for names, _ in tensors_inside(block))
            for block in _skeleton(artifact).blocks
        }
    return Shown((ENTRY, *inside, *outputs), inside)


def open_stream(
    artifact: Artifact,
    outputs: tuple[str, ...],
    names: tuple[str, ...],
    *,
    peaks: bool = False,
    exact: bool = False,
) -> Stream:
    """Open an artifact with the tensors called ``names`` shown; a checkpoint also in fp64.

    Raises:
        GraphError: its graph has no residual stream, or it is an engine.
    """
    if artifact.marked is not None:
        return EngineStream(artifact.marked)
    if artifact.module is not None:
        from msn_export.graph.reference import TorchStream

        heads = [head for head in Head if head.output in outputs]
        return TorchStream(artifact.module, heads, names, exact=exact)
    skeleton, model = _skeleton(artifact), artifact.graph
    assert model is not None  # _skeleton read it
    values = stages_of(model)
    for block in skeleton.blocks:
        for known, value in tensors_inside(block):
            values |= dict.fromkeys(known, value)
    values |= {value.name or "": value for value in model.graph.outputs}
    shown = {name: values[name] for name in names}
    return OnnxStream(model, shown, artifact.dtype, peaks=peaks)


def _skeleton(artifact: Artifact) -> Skeleton:
    if artifact.graph is None:
        raise GraphError(
            f"{artifact.name}: an engine shows no tensors on its way; compare the graph it was "
            "built from"
        )
    return find_stream(artifact.graph)


def _stage_of(model: ir.Model) -> dict[str, str]:
    """Assign each value to the stage that computes it."""
    skeleton = find_stream(model)
    return {
        value.name or "": f"block {block.number}"
        for block in skeleton.blocks
        for node in block.nodes
        for value in node.outputs
    }
