"""Run a graph over images and see the values of some of its tensors, a batch at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.calibration.observers import Histogram
from msn_export.errors import GraphError
from msn_export.graph import io

Seen = Mapping[str, NDArray[np.float32]]

# What the watched tensors of one batch may take, in bytes. Not a share of the free memory: the
# same images must be dealt into the same batches each time, for byte-identical ranges.
_BATCH_BYTES = 256 * 2**20
_FLOAT = ir.DataType.FLOAT


class Watch:
    """A session over a copy of ``model`` whose outputs are the values called ``names``.

    Args:
        model: an fp32 graph; not changed.
        names: its values to watch.
        stage: a folder for the copy.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], stage: Path) -> None:
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        values |= {value.name: value for value in copy.graph.inputs}
        self.names = tuple(dict.fromkeys(names))
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in self.names)
        RemoveUnusedNodesPass()(copy)
        self._fixed = _fixed_batch(copy)
        self.batch = self._fixed or _affordable(copy)
        with TemporaryDirectory(dir=stage) as own:
            path = Path(own) / "watched.onnx"
            io.save(copy, path)
            self._session = _session(path)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: NDArray[Any]) -> Seen:
        """Run up to ``batch`` images in the graph's own input type."""
        count = len(images)
        if self._fixed:
            images = images[np.arange(self._fixed) % count]
        outputs = self._session.run(list(self.names), {self._input: images})
        return {name: values[:count] for name, values in zip(self.names, outputs, strict=True)}


def finite(seen: Seen, labels: Sequence[str]) -> Seen:
    """Require finite values; give them back.

    Raises:
        GraphError: one is NaN or infinite; the message names the tensor and the image.
    """
    for name, values in seen.items():
        good = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not good.all():
            what = "NaN" if np.isnan(values).any() else "infinite"
            raise GraphError(
                f"tensor {name!r} is {what} on image {labels[int(np.argmin(good))]}; nothing can "
                "be calibrated on that: check the weights and the preprocessing"
            )
    return seen


def require_finite(
    model: ir.Model,
    outputs: Seen,
    labels: Sequence[str],
    image: Callable[[int], NDArray[Any]],
    stage: Path,
) -> None:
    """Require that the outputs of a graph are finite for each image.

    Args:
        model: the graph that gave ``outputs``.
        outputs: its outputs for all images, by name.
        labels: the images' names.
        image: gives the image of an index, as a batch of one.
        stage: a folder for what has to be run again.

    Raises:
        GraphError: one is not; the message names the first tensor of the graph that is not, and
            the image.
    """
    try:
        finite(outputs, labels)
    except GraphError:
        bad = np.zeros(len(labels), bool)
        for values in outputs.values():
            bad |= ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        at = int(np.argmax(bad))
        computed = [v for node in model.graph for v in node.outputs if v.dtype is _FLOAT]
        watch = Watch(model, [value.name or "" for value in computed], stage)
        finite(watch(image(at)), [labels[at]])
        raise


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    # a memory pattern is kept for each batch shape, and an arena never shrinks: off, so that
    # memory does not depend on how many images come
    options.enable_mem_pattern = False
    # a quantised graph computes what is written in it, on every processor the same
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _fixed_batch(model: ir.Model) -> int | None:
    shape = model.graph.inputs[0].shape
    return shape[0] if shape is not None and isinstance(shape[0], int) else None


def _affordable(model: ir.Model) -> int:
    """Choose how many images are run at once, by the size of what is watched and of attention."""
    each = sum(_size(value) for value in model.graph.outputs)
    for node in model.graph:
        if node.op_type == "Attention" and node.inputs[0] is not None:
            shape = [size for size in node.inputs[0].shape or () if isinstance(size, int)]
            if len(shape) == 3:  # [h, n, d]; scores and probabilities are [h, n, n] each
                each = max(each, 8 * shape[0] * shape[1] * shape[1])
    return max(1, min(8, _BATCH_BYTES // max(each, 1)))


def _size(value: ir.Value) -> int:
    sizes = [size for size in value.shape or () if isinstance(size, int)]
    return 4 * int(np.prod(sizes))


def channel_maxima(watch: Watch, batches: Iterable[tuple[NDArray[Any], Sequence[str]]]) -> Seen:
    """Take the largest absolute value of each channel, the last axis, of every watched value."""
    maxima: dict[str, NDArray[np.float32]] = {}
    for images, labels in batches:
        for name, values in finite(watch(images), labels).items():
            peaks = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            maxima[name] = np.maximum(maxima.get(name, peaks), peaks)
    return maxima


def histograms(
    watch: Watch,
    batches: Iterable[tuple[NDArray[Any], Sequence[str]]],
    told: Callable[[int], None] | None = None,
) -> dict[str, Histogram]:
    """Count the absolute values of every watched value; ``told`` hears how many images came."""
    found = {name: Histogram() for name in watch.names}
    count = 0
    for images, labels in batches:
        for name, values in finite(watch(images), labels).items():
            found[name].add(values)
        count += len(labels)
        if told is not None:
            told(count)
    return found
