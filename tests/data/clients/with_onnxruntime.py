"""Run a graph in the onnxruntime of this interpreter, CPU provider, default options."""

import json
import sys
from pathlib import Path

import numpy
import onnxruntime

graph, folder = sys.argv[1], Path(sys.argv[2])
given = json.loads((folder / "input.json").read_text())
images = numpy.fromfile(folder / "input.bin", given["dtype"]).reshape(given["shape"])
session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
arrays = session.run(names, {given["name"]: images})
outputs = {
    name: {"shape": array.shape, "values": array.ravel().tolist()}
    for name, array in zip(names, arrays)  # noqa: B905  Python 3.8 runs this too
}
(folder / "outputs.json").write_text(json.dumps(outputs))
