"""Run a graph in the tract of this interpreter."""

import json
import sys
from pathlib import Path

import numpy
import tract

graph, folder = sys.argv[1], Path(sys.argv[2])
given = json.loads((folder / "input.json").read_text())
images = numpy.fromfile(folder / "input.bin", given["dtype"]).reshape(given["shape"])
loaded = tract.onnx().load(graph)
names = [loaded.output_name(i) for i in range(loaded.output_count())]
arrays = [value.to_numpy() for value in loaded.into_model().into_runnable().run([images])]
outputs = {
    name: {"shape": array.shape, "values": array.ravel().tolist()}
    for name, array in zip(names, arrays, strict=True)
}
(folder / "outputs.json").write_text(json.dumps(outputs))
