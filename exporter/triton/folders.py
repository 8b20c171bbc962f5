"""The folders of a served model: its own and, for an ensemble, the two around it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msn_export.preprocessing import Preprocessing
from msn_export.sidecar import manifest_path
from msn_export.triton.artifact import Artifact, Platform
from msn_export.triton.check_files import WARMUP, one_line
from msn_export.triton.config import (
    LABELS,
    WARMUP_FILE,
    Settings,
    gpu_config,
    model_config,
    plan_name,
)
from msn_export.triton.lint import CONFIG, VARIANTS
from msn_export.triton.messages import ModelConfig
from msn_export.triton.preprocess import (
    ensemble_config,
    preprocess_config,
    require_floats,
    save_graph,
)
from msn_export.triton.readme import About, readme
from msn_export.triton.repository import ModelFolder


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
    artifacts: Sequence[Artifact]
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
    """Describe a model's folders; a preprocessing graph is written to ``stage``.

    Raises:
        SpecError: the artifacts cannot be served so.
        MissingPackageError: tritonclient is not installed.
    """
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


def _labels(artifact: Artifact) -> dict[str, bytes]:
    if not artifact.labels:
        return {}
    return {LABELS: "".join(f"{one_line(label)}\n" for label in artifact.labels).encode()}
