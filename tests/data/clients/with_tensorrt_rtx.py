"""Build an engine of a graph with a bare parser and builder of TensorRT-RTX; nothing is run.

Takes no GPU: the engine is for one compute capability, the third argument, as in 8.9.
"""

import json
import sys
from pathlib import Path

import tensorrt_rtx as trt


class Log(trt.ILogger):
    """Keep what went wrong."""

    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def fail(errors):
    """End with one line."""
    sys.exit("; ".join(" ".join(str(error).split()) for error in errors) or "no reason given")


graph, folder, capability = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
given = json.loads((folder / "input.json").read_text())
log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(graph):
    fail(parser.get_error(i).desc() for i in range(parser.num_errors))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + capability.replace(".", "")), 0)
profile = builder.create_optimization_profile()
shape = given["shape"][1:]
profile.set_shape(given["name"], (1, *shape), (4, *shape), (8, *shape))
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
if engine is None:
    fail(log.errors)
(folder / "outputs.json").write_text("{}")
