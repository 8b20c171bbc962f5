"""Run a graph in the OpenVINO of this interpreter, on the CPU, in the precision of the graph."""

import json
import sys
from pathlib import Path

import numpy

try:
    from openvino import Core
except ImportError:  # before 2023.1
    from openvino.runtime import Core

graph, folder = sys.argv[1], Path(sys.argv[2])
given = json.loads((folder / "input.json").read_text())
images = numpy.fromfile(folder / "input.bin", given["dtype"]).reshape(given["shape"])
core = Core()
# by default it computes fp32 graphs in bf16 where the processor has it
model = core.compile_model(core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = model.create_infer_request().infer({given["name"]: images})
outputs = {
    output.get_any_name(): {"shape": array.shape, "values": array.ravel().tolist()}
    for output, array in found.items()
}
(folder / "outputs.json").write_text(json.dumps(outputs))
