"""Run a folder of msn-export hub in optimum's ORTModel classes, with transformers' processor.

Arguments: the folder, the work folder, the task, the name of the graph's file.
"""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForImageClassification
from PIL import Image
from transformers import AutoImageProcessor

folder, work, task, name = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
pictures = json.loads((work / "input.json").read_text())["pictures"]
classifies = task == "image-classification"
kind = ORTModelForImageClassification if classifies else ORTModelForFeatureExtraction
model = kind.from_pretrained(folder, subfolder="onnx", file_name=name)
processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
images = [Image.open(picture).convert("RGB") for picture in pictures]
found = model(**processor(images, return_tensors="pt"))
outputs = {}
for output in ("logits",) if classifies else ("last_hidden_state",):
    array = found[output].numpy()
    outputs[output] = {"shape": array.shape, "values": array.ravel().tolist()}
(work / "outputs.json").write_text(json.dumps(outputs))
