"""The folders of served models: written in a staging folder, then moved into the repository."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msn_export.errors import OutputError, SpecError
from msn_export.manifest import manifest_path
from msn_export.preprocessing import Preprocessing
from msn_export.triton import config as messages
from msn_export.triton.check_artifacts import WARMUP, one_line, version_folders
from msn_export.triton.config import (
    LABELS,
    WARMUP_FILE,
    ModelConfig,
    Settings,
    gpu_config,
    model_config,
    plan_name,
)
from msn_export.triton.lint import CONFIG, VARIANTS
from msn_export.triton.model import Platform, ServedArtifact
from msn_export.triton.preprocess import (
    ensemble_config,
    preprocess_config,
    require_floats,
    save_graph,
)
from msn_export.triton.readme import About, readme

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
    """Require a name that is a folder's and fits in a URL.

    Raises:
        SpecError: it is not.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) is None:
        raise SpecError(
            f"model name {name!r} must be letters, digits, dots, dashes and underscores, and begin "
            "with a letter or digit; choose one with --name"
        )


def require_room(repository: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse, before any work is done, a repository that the models could not be put into.

    Raises:
        OutputError: it is no folder, cannot be written, or has a model of that name already.
    """
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

    Raises:
        OutputError: the file system refused; the repository is as it was.
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
    """Put a staged version under the configuration that a model is served with already.

    Raises:
        OutputError: the model has that version.
    """
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


def _labels(artifact: ServedArtifact) -> dict[str, bytes]:
    if not artifact.labels:
        return {}
    return {LABELS: "".join(f"{one_line(label)}\n" for label in artifact.labels).encode()}
