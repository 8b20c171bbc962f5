"""The ensemble: bytes as a decoder gives them are normalised in Triton, then go to the model.

Triton has no preprocessing backend but Python and DALI; a graph of six nodes in the onnxruntime
backend needs neither. Resizing stays with the client: no served form of it equals Pillow's.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from msn_export.errors import OutputError, SpecError
from msn_export.manifest import manifest_path
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat, TensorSpec
from msn_export.triton_server import config as messages
from msn_export.triton_server.check_artifacts import WARMUP, one_line, version_folders
from msn_export.triton_server.config import (
    LABELS,
    WARMUP_FILE,
    ModelConfig,
    Settings,
    base_config,
    gpu_config,
    model_config,
    plan_name,
)
from msn_export.triton_server.lint import CONFIG, VARIANTS
from msn_export.triton_server.model import Platform, ServedArtifact
from msn_export.triton_server.readme import About, readme

OPSET = 17  # every onnxruntime in the table of releases knows it
IR_VERSION = 8


def require_floats(artifact: ServedArtifact) -> TensorSpec:
    """Require that a model has one image input that wants floats, and give it."""
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


HEADER = "Written by msn-export triton; msn-export triton --lint checks it after a change."


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model of a repository, its files by their path in the folder.

    ``configs`` and ``contents`` are written, ``copies`` copied from where they lie.
    """

    name: str
    configs: Mapping[str, ModelConfig]
    copies: Mapping[str, Path] = field(default_factory=dict)
    contents: Mapping[str, bytes] = field(default_factory=dict)


def require_name(name: str) -> None:
    """Require a name that is a folder's and fits in a URL."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) is None:
        raise SpecError(
            f"model name {name!r} must be letters, digits, dots, dashes and underscores, and begin "
            "with a letter or digit; choose one with --name"
        )


def require_room(repository: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse, before any work is done, a repository that the models could not be put into."""
    place = repository if repository.exists() else repository.parent
    if not place.is_dir():
        raise OutputError(f"{place} is no folder; choose another repository with -o")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"folder {place} is not writable; choose another repository with -o")
    if (repository / CONFIG).exists():
        raise OutputError(
            f"{repository} is one model's folder, not a repository; choose the folder around it"
        )
    for name in names:
        if os.path.lexists(repository / name) and not force:
            raise OutputError(
                f"model {name} is in {repository} already; --force replaces it, --name adds "
                "another, --model-version N adds a version of it"
            )


def write(models: Sequence[ModelFolder], stage: Path) -> None:
    """Write models' folders into ``stage``."""
    for model in models:
        folder = stage / model.name
        for place, config in model.configs.items():
            _target(folder, place).write_text(messages.to_text(config, HEADER), encoding="utf-8")
        for place, content in model.contents.items():
            _target(folder, place).write_bytes(content)
        for place, source in model.copies.items():
            shutil.copyfile(source, _target(folder, place))


def _target(folder: Path, place: str) -> Path:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def move_in(names: Sequence[str], stage: Path, repository: Path) -> None:
    """Move checked folders from ``stage`` into the repository, each by one rename.

    What they replace goes to ``stage``, and back if a later move fails. A model comes before the
    ensemble that names it, so that a server that polls never sees the one without the other.
    """
    aside = stage / ".replaced"
    moved: list[str] = []
    made = not repository.exists()
    try:
        repository.mkdir(exist_ok=True)
        for name in names:
            target = repository / name
            if os.path.lexists(target):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                target.rename(aside / name)
            moved.append(name)
            (stage / name).rename(target)
    except OSError as error:
        for name in reversed(moved):
            if (repository / name).exists():
                (repository / name).rename(stage / name)
            if os.path.lexists(aside / name):
                (aside / name).rename(repository / name)
        if made:
            repository.rmdir()
        raise OutputError(f"cannot write {repository}: {error.strerror}") from error


def join_version(existing: Path, staged: Path, version: int) -> None:
    """Put a staged version under the configuration that a model is served with already."""
    if version in version_folders(existing):
        raise OutputError(
            f"{existing} has a version {version}; give a higher --model-version, or --force "
            "without it to write the model anew"
        )
    for entry in staged.iterdir():
        if entry.name != str(version):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in existing.iterdir():
        if entry.is_symlink():
            continue
        if entry.is_file():
            shutil.copyfile(entry, staged / entry.name)
        elif entry.name in {VARIANTS, WARMUP}:
            shutil.copytree(entry, staged / entry.name)


@dataclass(frozen=True, slots=True)
class Served:
    """A model to be served; ``artifacts`` are one graph, or its engines for several GPUs.

    ``preprocessing`` is how its client makes pictures into its input, where that is known.
    ``ensemble`` is what a model in front of it normalises bytes with, ``warmup`` the raw input
    that each instance runs first.
    """

    repository: Path
    name: str
    version: int
    artifacts: Sequence[ServedArtifact]
    settings: Settings
    preprocessing: Preprocessing | None = None
    ensemble: Preprocessing | None = None
    warmup: bytes | None = None

    @property
    def names(self) -> list[str]:
        """Its models, each before the one that needs it."""
        if self.ensemble is None:
            return [self.name]
        return [f"{self.name}-preprocess", self.name, f"{self.name}-images"]


def model_folders(served: Served, stage: Path) -> list[ModelFolder]:
    """Describe a model's folders; a preprocessing graph is written to ``stage``."""
    first, settings = served.artifacts[0], served.settings
    config = model_config(served.name, served.artifacts, settings)
    if served.ensemble is None:
        return [_model_folder(served, config, None)]
    before, after = _around(served, config)
    graph = stage / "preprocess.onnx"
    save_graph(require_floats(first), served.ensemble, first.fixed_batch or "batch", graph)
    version = f"{served.version}/{Platform.ONNX.filename}"
    return [
        ModelFolder(before.name, {CONFIG: before}, {version: graph}),
        _model_folder(served, config, after),
        # an ensemble has nothing in its version's folder, but Triton wants the folder
        ModelFolder(after.name, {CONFIG: after}, contents={**_labels(first), "1/.keep": b""}),
    ]


def _model_folder(served: Served, config: ModelConfig, ensemble: ModelConfig | None) -> ModelFolder:
    first, settings = served.artifacts[0], served.settings
    file = f"{served.version}/{plan_name(first, served.artifacts)}"
    about = About(served.repository, config, first, file, settings, ensemble, served.preprocessing)
    contents = {**_labels(first), "README.md": readme(about).encode()}
    if served.warmup is not None:
        contents[f"{WARMUP}/{WARMUP_FILE}"] = served.warmup
    configs = {CONFIG: config}
    if first.platform is Platform.ONNX or settings.cuda_graphs:
        variant = gpu_config(config, first, cuda_graphs=settings.cuda_graphs)
        configs[f"{VARIANTS}/gpu.pbtxt"] = variant
    return ModelFolder(served.name, configs, _copies(served), contents)


def _around(served: Served, config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """Describe the model before ``config`` and the ensemble of both."""
    spec = require_floats(served.artifacts[0])
    before_name, _, after_name = served.names
    before = preprocess_config(before_name, spec, config, served.settings)
    return before, ensemble_config(after_name, before, config)


def _copies(served: Served) -> dict[str, Path]:
    copies: dict[str, Path] = {}
    for artifact in served.artifacts:
        target = f"{served.version}/{plan_name(artifact, served.artifacts)}"
        copies[target] = artifact.path
        if artifact.manifest is not None:
            copies[f"{target}.json"] = manifest_path(artifact.path)
        for weights in artifact.weights:
            copies[f"{served.version}/{weights.relative_to(artifact.path.parent)}"] = weights
    return copies


def _labels(artifact: ServedArtifact) -> dict[str, bytes]:
    if not artifact.labels:
        return {}
    return {LABELS: "".join(f"{one_line(label)}\n" for label in artifact.labels).encode()}
