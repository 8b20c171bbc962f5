"""The steps of ``msn-export hub``: checked graphs and their configuration, one whole folder."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export import __version__
from msn_export import manifest as manifests
from msn_export.artifact import Artifact
from msn_export.calibration.job import CalibrateJob
from msn_export.commands.calibrate import run_calibrate
from msn_export.commands.hub_job import HubJob, require_free
from msn_export.commands.jobs import OnnxJob
from msn_export.commands.onnx import run_onnx
from msn_export.compare.sides import preprocessing_of, size_difference, sized, with_classifier
from msn_export.errors import CheckpointError, GraphError, OutputError, SpecError
from msn_export.files import apart, move_in, staging
from msn_export.graph.classifier import fitted_classifier
from msn_export.hub_folder import CARD, CONFIG, GRAPHS, transformers_config
from msn_export.manifest import CheckRecord, Manifest, SourceRecord, manifest_path, seal
from msn_export.models.checkpoint import Checkpoint, Choices, kind_of, load_checkpoint
from msn_export.models.config import PREPROCESSOR, readout_in
from msn_export.processor_config import to_processor_config
from msn_export.progress import SILENT, Progress
from msn_export.reporting.hub_card import HubCard
from msn_export.schema import Result
from msn_export.spec import Dtype, Head, ImageSize, InputFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import HfApi

    from msn_export.fit_record import FitRecord
    from msn_export.models.config import LinearClassifier
    from msn_export.preprocessing import Preprocessing

__all__ = ["HubJob", "run_hub"]  # the two that docs/python.md speaks of


@dataclass(frozen=True, slots=True)
class HubGraph:
    """A graph of the folder, and what came of its check."""

    file: str
    dtype: Dtype
    bytes: int
    sha256: str
    check: CheckRecord | None


@dataclass(frozen=True, slots=True, repr=False)
class HubFolder(Result):
    """A folder that was written; ``task`` is the pipeline that runs it.

    ``pushed`` is the repository's address, empty where it was not uploaded.
    """

    output: str
    task: str
    graphs: tuple[HubGraph, ...]
    pushed: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that is to be written: its checkpoint, as it is read again for each graph.

    ``labels`` are names of classes that the checkpoint does not have, ``classifier`` and ``fit``
    what was fitted on it.
    """

    checkpoint: Checkpoint
    source: str
    choices: Choices
    preprocessing: Preprocessing
    head: Head
    labels: tuple[str, ...] = ()
    classifier: LinearClassifier | None = None
    fit: FitRecord | None = None

    @property
    def base_model(self) -> str | None:
        """The hub id of its checkpoint; None where it is not from a hub."""
        source = self.checkpoint.source
        return source.partition("@")[0] if kind_of(self.source) == "hub" else None

    @property
    def config(self) -> Mapping[str, object]:
        config = self.checkpoint.config
        if self.head is not Head.LOGITS:
            config = replace(config, labels=(), problem_type=None)
        return transformers_config(replace(config, labels=self.labels or config.labels))


def run_hub(job: HubJob, progress: Progress = SILENT) -> HubFolder:
    """Write a model's folder as hubs have it, whole or not at all, and upload it if asked to.

    Raises:
        MsnExportError: whatever kept a graph from its gate, or the folder from its place, which is
            as it was; or the upload failed, and the folder is written.
    """
    output = job.validate_paths()
    if job.push is not None:
        require_token()
    with progress.step("load checkpoint"):
        model = of_graph(Path(job.checkpoint)) if job.is_graph else of_checkpoint(job)
    model.checkpoint.model.to("meta")  # each export reads the weights again
    place = output.absolute()
    with staging(place.parent) as stage:
        folder = stage / place.name
        (folder / "onnx").mkdir(parents=True)
        _write_json(folder / CONFIG, model.config)
        _write_json(folder / PREPROCESSOR, to_processor_config(model.preprocessing))
        written = _graphs(job, model, folder, apart(stage), progress)
        notes = tuple(dict.fromkeys((*model.checkpoint.notes, *model.preprocessing.notes)))
        card = HubCard(job.push or place.name, written, model.base_model, notes)
        (folder / CARD).write_text(str(card), encoding="utf-8")
        require_free(output, Path(job.checkpoint), force=job.force)
        move_in([place.name], stage, place.parent)
    pushed = ""
    if job.push is not None:
        with progress.step(f"push to {job.push}"):
            pushed = push(place, job.push, private=job.private)
    graphs = tuple(
        HubGraph(GRAPHS[dtype], dtype, one.bytes, one.sha256, one.check)
        for dtype, one in written.items()
    )
    notes = tuple(dict.fromkeys((*notes, *(n for one in written.values() for n in one.notes))))
    return HubFolder(str(output), card.task, graphs, pushed, notes)


def of_checkpoint(job: HubJob) -> HubModel:
    """Load a checkpoint, with its own preprocessing unless another is asked for."""
    checkpoint = load_checkpoint(job.checkpoint, job.choices)
    if job.preprocess == "auto" and (difference := size_difference(checkpoint)) is not None:
        raise SpecError(
            f"{difference}; choose one with msn-export onnx --image-size, and give that graph"
        )
    preprocessing = preprocessing_of(checkpoint, job.preprocess)
    head = Head.LOGITS if checkpoint.config.labels else Head.TOKENS
    return HubModel(checkpoint, job.checkpoint, job.choices, preprocessing, head)


def of_graph(path: Path) -> HubModel:
    """Load the checkpoint that a graph was exported from, and the classifier that was fitted.

    Raises:
        MsnExportError: its manifest does not lead to the weights, or no client feeds the graph.
    """
    graph = Artifact.open(path, is_graph=True)
    manifest = graph.manifest
    if manifest is None or manifest.checkpoint is None or manifest.preprocessing is None:
        raise GraphError(
            f"{path} has no manifest that names its checkpoint; give the checkpoint itself"
        )
    if manifest.inputs[0].dtype == InputFormat.UINT8:
        raise GraphError(
            f"{path} takes uint8, which transformers.js and optimum do not feed; export it again "
            "with --input float, or give its checkpoint"
        )
    readout = readout_in(manifest.config or {}, f"manifest of {path.name}")
    if readout["kept"]:
        raise GraphError(
            f"{path} computes {len(readout['kept'])} patches alone (--keep-patches); a folder has "
            "the whole model: give its checkpoint, or a graph of all patches"
        )
    checkpoint = _load_again(path, manifest)
    checkpoint = sized(checkpoint, manifest.preprocessing.size)
    classifier = None
    if manifest.fit is not None:
        classifier = fitted_classifier(path, manifest)
        checkpoint = with_classifier(checkpoint, classifier)
    has_logits = any(spec.name == Head.LOGITS.output for spec in manifest.outputs)
    own = manifest.labels != checkpoint.config.labels and has_logits
    return HubModel(
        checkpoint, manifest.checkpoint.source,
        Choices(manifest.checkpoint.variant, manifest.checkpoint.weights),
        manifest.preprocessing, Head.LOGITS if has_logits else Head.TOKENS,
        manifest.labels if own else (), classifier, manifest.fit,
    )  # fmt: skip


def _load_again(path: Path, manifest: Manifest) -> Checkpoint:
    record = manifest.checkpoint
    assert record is not None  # of_graph requires it
    try:
        checkpoint = load_checkpoint(record.source, Choices(record.variant, record.weights))
    except CheckpointError as error:
        raise CheckpointError(f"{path} was exported from what cannot be read: {error}") from error
    if checkpoint.sha256 != record.sha256:
        raise CheckpointError(
            f"checkpoint {record.source} has other weights than {path} was exported from; export "
            "it again, or give the checkpoint itself"
        )
    return checkpoint


def _graphs(
    job: HubJob, model: HubModel, folder: Path, aside: Path, progress: Progress
) -> dict[Dtype, Manifest]:
    """Export each graph from the checkpoint; int8 is quantised from the fp32 graph."""
    found: dict[Dtype, Manifest] = {}
    for dtype in job.written:
        if dtype is not Dtype.INT8:
            found[dtype] = _export(job, model, dtype, folder, aside, progress)
            continue
        source = folder / GRAPHS[Dtype.FP32]
        if not source.is_file():
            source = aside / source.name
            _export(job, model, Dtype.FP32, folder, aside, progress, source)
        found[dtype] = _quantise(job, source, folder / GRAPHS[dtype], aside, progress)
    return found


def _export(  # noqa: PLR0913
    job: HubJob, model: HubModel, dtype: Dtype, folder: Path, aside: Path, progress: Progress,
    output: Path | None = None,
) -> Manifest:  # fmt: skip
    output = output or folder / GRAPHS[dtype]
    choices = model.choices
    if model.labels and model.classifier is None:
        labels = aside / "labels.json"
        _write_json(labels, list(model.labels))
        choices = replace(choices, labels=labels)
    _, manifest = run_onnx(
        OnnxJob(
            model.source, output,
            variant=choices.variant, weights=choices.weights, labels=choices.labels,
            heads=(model.head,), dtype=dtype, target=job.target, images=job.images,
            image_size=ImageSize(*model.checkpoint.config.image_size),
            preprocess=str(folder / PREPROCESSOR), exif=model.preprocessing.exif,
            classifier=model.classifier, command=job.command,
        ),
        progress,
    )  # fmt: skip
    if model.fit is not None:
        fp32 = folder / GRAPHS[Dtype.FP32]
        source = SourceRecord(fp32.name, manifests.sha256_of(fp32)) if fp32.is_file() else None
        manifest = replace(manifest, fit=model.fit, source=None if output == fp32 else source)
        manifest_path(output).write_text(seal(manifest), encoding="utf-8")
    return manifest


def _quantise(job: HubJob, source: Path, output: Path, aside: Path, progress: Progress) -> Manifest:
    assert job.images is not None  # HubJob requires it
    path, manifest = run_calibrate(
        CalibrateJob(
            source, Dtype.INT8, job.images, aside / output.name, compile=False, command=job.command
        ),
        progress,
    )
    manifest_path(path).rename(manifest_path(output))
    path.rename(output)
    return manifest


def _write_json(path: Path, plain: object) -> None:
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def require_token() -> None:
    """Refuse an upload before the work, where nobody is logged in."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise SpecError("--push needs a token of the hub; run 'hf auth login', or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to a repository of the hub, which is made where there is none.

    HF_ENDPOINT and HF_TOKEN are honoured by huggingface_hub itself.

    Raises:
        OutputError: it is not there; the message says why.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="msn-export", library_version=__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private:
            _require_private(api, folder, repository)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"msn-export {__version__}"
        )
    except OutputError:
        raise
    except Exception as error:  # its own errors, and those of whatever carries its requests
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
        raise OutputError(
            f"{folder} is written and not pushed to {repository} ({reason}); check the name, the "
            "token and the network, and upload it with 'hf upload'"
        ) from error
    return str(address)


def _require_private(api: HfApi, folder: Path, repository: str) -> None:
    if not api.model_info(repository).private:
        raise OutputError(
            f"{folder} is written and not pushed: repository {repository} is public; leave "
            "--private out, or name another"
        )
