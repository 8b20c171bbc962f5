"""The ensemble: bytes as a decoder gives them are normalised in Triton, then go to the model.

Triton has no preprocessing backend but Python and DALI; a graph of six nodes in the onnxruntime
backend needs neither. Resizing stays with the client: no served form of it equals Pillow's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from msn_export.errors import SpecError
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat, TensorSpec
from msn_export.triton import config as messages
from msn_export.triton.config import ModelConfig, Settings, base_config
from msn_export.triton.model import Platform, ServedArtifact

OPSET = 17  # every onnxruntime in the table of releases knows it
IR_VERSION = 8


def require_floats(artifact: ServedArtifact) -> TensorSpec:
    """Require that a model has one image input that wants floats, and give it.

    Raises:
        SpecError: it takes bytes itself, or something that is no image.
    """
    (spec, *others) = artifact.inputs
    if spec.dtype == "uint8":
        raise SpecError(
            f"--ensemble: {artifact.path.name} takes uint8 images itself (its normalisation is "
            "inside the graph); leave --ensemble out"
        )
    if others or len(spec.shape) != 4 or spec.dtype not in {"float", "float16"}:
        raise SpecError(
            f"--ensemble: {artifact.path.name} takes {spec.name!r} {spec.dtype} "
            f"[{', '.join(map(str, spec.shape))}]; expected one image input [b, c, h, w] of floats"
        )
    if not all(isinstance(size, int) for size in spec.shape[1:]):
        raise SpecError(
            f"--ensemble: {artifact.path.name} has a dynamic height or width; export it with "
            "--image-size"
        )
    return spec


def save_graph(
    spec: TensorSpec, preprocessing: Preprocessing, batch: int | str, path: Path
) -> None:
    """Write the graph ``images`` uint8 [b, h, w, c] -> ``spec``, floats [b, c, h, w].

    The operations are those of ``images.normalize``, in its order and its rounding (a byte times
    the scale is a double first): the floats are the same to the last bit.

    Raises:
        SpecError: the preprocessing is for another number of channels.
    """
    channels, height, width = spec.shape[1:]
    if channels != preprocessing.channels:
        raise SpecError(
            f"the model takes {channels} channels, its preprocessing normalises "
            f"{preprocessing.channels}; export it again"
        )
    images = ir.Value(
        name=InputFormat.UINT8.tensor,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([batch, height, width, channels]),
    )
    scale = _constant("scale", np.float64(preprocessing.scale))
    mean = _constant("mean", np.asarray(preprocessing.mean, np.float32))
    std = _constant("std", np.asarray(preprocessing.std, np.float32))
    nodes = [ir.node("Cast", [images], {"to": ir.DataType.DOUBLE})]
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], scale]))
    nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.FLOAT}))
    for op, constant in (("Sub", mean), ("Div", std)):
        nodes.append(ir.node(op, [nodes[-1].outputs[0], constant]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 3, 1, 2]}))
    if spec.dtype == "float16":
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.FLOAT16}))
    result = nodes[-1].outputs[0]
    result.name = spec.name
    result.type = ir.TensorType(ir.DataType[spec.dtype.upper()])
    result.shape = ir.Shape([batch, *spec.shape[1:]])
    graph = ir.Graph(
        [images], [result], nodes=nodes, initializers=[scale, mean, std],
        opset_imports={"": OPSET}, name="preprocess",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="msn-export")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _constant(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    shape = ir.Shape(np.shape(array))
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
    value.const_value = tensor
    return value


def preprocess_config(
    name: str, spec: TensorSpec, model: ModelConfig, settings: Settings
) -> ModelConfig:
    """Describe the preprocessing model that feeds ``model``."""
    config = base_config(name, Platform.ONNX, model.max_batch_size)
    (target,) = model.input
    config.input.add(
        name=InputFormat.UINT8.tensor,
        data_type=messages.module().DataType.Value("TYPE_UINT8"),
        dims=_bytes_dims(list(target.dims)),
    )
    config.output.add(name=spec.name, data_type=target.data_type, dims=target.dims)
    if model.max_batch_size:
        # no delay: the model behind it waits for company already
        config.dynamic_batching.SetInParent()
    config.instance_group.add(count=settings.instances)
    config.parameters["triton_release"].string_value = settings.release.name
    return config


def ensemble_config(name: str, preprocess: ModelConfig, model: ModelConfig) -> ModelConfig:
    """Describe the ensemble of both: what clients call with bytes."""
    config = messages.module().ModelConfig(
        name=name, platform="ensemble", max_batch_size=model.max_batch_size
    )
    config.version_policy.latest.num_versions = 1
    config.input.extend(preprocess.input)
    config.output.extend(model.output)
    (source,), (target,) = preprocess.input, model.input
    for step, ins, outs in (
        (preprocess, [source.name], [target.name]),
        (model, [target.name], [output.name for output in model.output]),
    ):
        added = config.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
        added.input_map.update({tensor: tensor for tensor in ins})
        added.output_map.update({tensor: tensor for tensor in outs})
    config.parameters["triton_release"].CopyFrom(model.parameters["triton_release"])
    return config


def _bytes_dims(planes: Sequence[int]) -> list[int]:
    """Turn [.., c, h, w] into [.., h, w, c]."""
    *batch, channels, height, width = planes
    return [*batch, height, width, channels]
