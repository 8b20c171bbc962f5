"""A Python-based Triton backend called onnxruntime: it runs 1/model.onnx in onnxruntime's CPU.

It stands in for the C++ backend of that name, which no package ships. It joins the requests that
Triton's batcher gives it into one run, and refuses at load what the C++ backend refuses: other
tensors, dtypes and shapes than the graph's (onnxruntime_backend src/onnxruntime.cc ValidateInputs,
ValidateOutputs; src/onnxruntime_utils.cc CompareDimsSupported).
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as utils

TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_UINT8": "tensor(uint8)",
         "TYPE_FP16": "tensor(float16)", "TYPE_INT64": "tensor(int64)"}  # fmt: skip


class TritonPythonModel:
    """One instance of a model."""

    @staticmethod
    def auto_complete_config(config):
        """Complete nothing."""
        return config

    def initialize(self, args):
        """Open the graph and hold the configuration against it."""
        self.config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        name = self.config.get("default_model_filename") or "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(folder / name), options, providers=["CPUExecutionProvider"]
        )
        batching = self.config["max_batch_size"] > 0
        graph = self.session.get_inputs()
        if len(graph) != len(self.config["input"]):
            raise utils.TritonModelException(
                f"configuration expects {len(self.config['input'])} inputs, model provides "
                f"{len(graph)}"
            )
        require(self.config["input"], graph, batching, exact=False)
        require(self.config["output"], self.session.get_outputs(), batching, exact=True)

    def execute(self, requests):
        """Run all requests at once."""
        feeds = {
            tensor["name"]: [
                utils.get_input_tensor_by_name(request, tensor["name"]).as_numpy()
                for request in requests
            ]
            for tensor in self.config["input"]
        }
        sizes = [len(batch) for batch in next(iter(feeds.values()))]
        names = [tensor["name"] for tensor in self.config["output"]]
        outputs = self.session.run(names, {name: np.concatenate(x) for name, x in feeds.items()})
        cuts = np.cumsum(sizes)[:-1]
        parts = [np.split(output, cuts) for output in outputs]
        return [
            utils.InferenceResponse(
                [utils.Tensor(name, part[i]) for name, part in zip(names, parts, strict=True)]
            )
            for i in range(len(requests))
        ]


def require(tensors, graph, batching, *, exact):
    """Require that tensors of the configuration are the graph's."""
    known = {value.name: value for value in graph}
    for tensor in tensors:
        name, value = tensor["name"], known.get(tensor["name"])
        if value is None:
            raise utils.TritonModelException(
                f"unexpected inference tensor '{name}', allowed are: {', '.join(known)}"
            )
        if TYPES.get(tensor["data_type"]) != value.type:
            raise utils.TritonModelException(
                f"configuration expects datatype {tensor['data_type']} for '{name}', model "
                f"provides {value.type}"
            )
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        dims = [int(size) for size in tensor["dims"]]
        if batching and shape[0] != -1:
            raise utils.TritonModelException(
                f"tensor '{name}': for the model to support batching the first dimension must be "
                f"-1; but shape expected by the model is {shape}"
            )
        full = [-1, *dims] if batching else dims
        fits = len(full) == len(shape) and all(
            ours == theirs or (not exact and theirs == -1)
            for ours, theirs in zip(full, shape, strict=True)
        )
        if not fits:
            raise utils.TritonModelException(
                f"tensor '{name}': the model expects shape {shape} but the model configuration "
                f"specifies {full}"
            )
