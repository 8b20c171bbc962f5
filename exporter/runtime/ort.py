"""Run an ONNX file in onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from msn_export.errors import GraphError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class OrtRunner:
    """An onnxruntime session over one image input.

    Args:
        model: an .onnx file.
        providers: execution providers, in order of preference.
        threads: a run may use; None leaves it to onnxruntime.

    Raises:
        GraphError: onnxruntime refuses the graph.
    """

    def __init__(
        self,
        model: Path,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = (
            3  # errors; the graph optimiser's remarks are no one's business
        )
        try:
            self.session = onnxruntime.InferenceSession(
                str(model), options, providers=list(providers)
            )
        except Exception as error:
            raise GraphError(f"onnxruntime refuses {model.name}: {_one_line(error)}") from error
        self.input = self.session.get_inputs()[0].name
        self.outputs = tuple(output.name for output in self.session.get_outputs())
        self.name = f"onnxruntime {onnxruntime.__version__}, {self.session.get_providers()[0]}"

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Run a batch in the graph's own input type; outputs by name."""
        try:
            outputs = self.session.run(None, {self.input: images})
        except Exception as error:
            raise GraphError(f"onnxruntime failed on a batch: {_one_line(error)}") from error
        return dict(zip(self.outputs, outputs, strict=True))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
