"""A Python-based Triton backend called tensorrt, for tests of configuration and serving only.

It deserialises no engine. It requires that the file which the C++ backend would open is there, and
answers with sums of the input in the shapes that the configuration promises.
"""

import json
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    """One instance of a model."""

    @staticmethod
    def auto_complete_config(config):
        """Complete nothing."""
        return config

    def initialize(self, args):
        """Find the plan for the compute capability in STAND_IN_CAPABILITY, 8.9 if unset."""
        self.config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        named = self.config.get("cc_model_filenames") or {}
        capability = os.environ.get("STAND_IN_CAPABILITY", "8.9")
        default = self.config.get("default_model_filename") or "model.plan"
        path = folder / named.get(capability, default)
        if not path.is_file():
            raise utils.TritonModelException(f"unable to find '{path}' for model instance")

    def execute(self, requests):
        """Answer each request with the sum of each of its images."""
        (source,) = self.config["input"]
        return [self._answer(request, source["name"]) for request in requests]

    def _answer(self, request, name):
        batch = utils.get_input_tensor_by_name(request, name).as_numpy()
        sums = batch.reshape(len(batch), -1).sum(axis=1, dtype=np.float64)
        tensors = []
        for output in self.config["output"]:
            dims = [int(size) for size in output["dims"]]
            shape = [len(batch), *(dims if self.config["max_batch_size"] else dims[1:])]
            filled = np.broadcast_to(sums.reshape(-1, *[1] * (len(shape) - 1)), shape)
            kind = utils.triton_string_to_numpy(output["data_type"])
            tensors.append(utils.Tensor(output["name"], np.ascontiguousarray(filled, kind)))
        return utils.InferenceResponse(tensors)
