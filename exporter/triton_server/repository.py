"""A repository's folders: their files, their move into place, and a model's README."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msn_export.errors import OutputError, SpecError
from msn_export.manifest import manifest_path
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat
from msn_export.triton_server.checks import WARMUP, one_line, version_folders
from msn_export.triton_server.config import (
    LABELS,
    WARMUP_FILE,
    ModelConfig,
    Settings,
    datatype_name,
    ensemble_config,
    gpu_config,
    model_config,
    plan_name,
    preprocess_config,
    require_floats,
    save_graph,
    to_text,
)
from msn_export.triton_server.lint import CONFIG, VARIANTS
from msn_export.triton_server.model import LOGITS, Platform, ServedArtifact
from msn_export.version_table import Client, numbers

HEADER = "Written by msn-export triton; msn-export triton --lint checks it after a change."


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model of a repository, its files by their path in the folder.

    ``contents`` are written, ``copies`` copied from other paths.
    """

    name: str
    contents: Mapping[str, bytes]
    copies: Mapping[str, Path] = field(default_factory=dict)


def require_name(name: str) -> None:
    """Require a name that is a folder's and fits in a URL."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) is None:
        raise SpecError(
            f"model name {name!r} must be letters, digits, dots, dashes and underscores, and begin "
            "with a letter or digit; choose one with --name"
        )


def require_free(repository: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse, before any work is done, a repository that the models could not be put into."""
    if not repository.absolute().name.isprintable():
        raise OutputError(
            f"{str(repository)!r} is not printable; choose another repository with -o"
        )
    folder = repository if repository.exists() else repository.parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder; choose another repository with -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"folder {folder} is not writable; choose another repository with -o")
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
    for model in models:
        folder = stage / model.name
        for name in (*model.contents, *model.copies):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, content in model.contents.items():
            (folder / name).write_bytes(content)
        for name, source in model.copies.items():
            shutil.copyfile(source, folder / name)


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

    ``preprocessing`` is how its client makes pictures into its input, where that is known; with
    ``ensemble`` a model in front of it normalises bytes so. ``warmup`` is the raw input that each
    instance runs first.
    """

    repository: Path
    name: str
    version: int
    artifacts: Sequence[ServedArtifact]
    settings: Settings
    preprocessing: Preprocessing | None = None
    ensemble: bool = False
    warmup: bytes | None = None

    @property
    def first(self) -> ServedArtifact:
        return self.artifacts[0]

    def file_of(self, artifact: ServedArtifact) -> str:
        return f"{self.version}/{plan_name(artifact, self.artifacts)}"

    @property
    def names(self) -> list[str]:
        """Its models, each before the one that needs it."""
        if not self.ensemble:
            return [self.name]
        return [f"{self.name}-preprocess", self.name, f"{self.name}-images"]


def model_folders(served: Served, stage: Path) -> list[ModelFolder]:
    """Describe a model's folders; a preprocessing graph is written to ``stage``."""
    first = served.first
    config = model_config(served.name, served.artifacts, served.settings)
    if not served.ensemble or served.preprocessing is None:
        return [_model_folder(served, config, None)]
    spec = require_floats(first)
    before_name, _, after_name = served.names
    before = preprocess_config(before_name, spec, config, served.settings)
    after = ensemble_config(after_name, before, config)
    graph = stage / "preprocess.onnx"
    save_graph(spec, served.preprocessing, first.fixed_batch or "batch", graph)
    version = f"{served.version}/{Platform.ONNX.filename}"
    return [
        ModelFolder(before.name, {CONFIG: _text_of(before)}, {version: graph}),
        _model_folder(served, config, after),
        # an ensemble has nothing in its version's folder, but Triton wants the folder
        ModelFolder(after.name, {CONFIG: _text_of(after), **_labels(first), "1/.keep": b""}),
    ]


def _text_of(config: ModelConfig) -> bytes:
    return to_text(config, HEADER).encode()


def _model_folder(served: Served, config: ModelConfig, ensemble: ModelConfig | None) -> ModelFolder:
    first, settings = served.first, served.settings
    contents = {
        CONFIG: _text_of(config),
        "README.md": readme(served, config, ensemble).encode(),
        **_labels(first),
    }
    if served.warmup is not None:
        contents[f"{WARMUP}/{WARMUP_FILE}"] = served.warmup
    if first.platform is Platform.ONNX or settings.cuda_graphs:
        variant = gpu_config(config, first, cuda_graphs=settings.cuda_graphs)
        contents[f"{VARIANTS}/gpu.pbtxt"] = _text_of(variant)
    copies: dict[str, Path] = {}
    for artifact in served.artifacts:
        target = served.file_of(artifact)
        copies[target] = artifact.path
        if artifact.manifest is not None:
            copies[f"{target}.json"] = manifest_path(artifact.path)
        for weights in artifact.weights:
            copies[f"{served.version}/{weights.relative_to(artifact.path.parent)}"] = weights
    return ModelFolder(served.name, contents, copies)


def _labels(artifact: ServedArtifact) -> dict[str, bytes]:
    if not artifact.labels:
        return {}
    return {LABELS: "".join(f"{one_line(label)}\n" for label in artifact.labels).encode()}


def readme(served: Served, config: ModelConfig, ensemble: ModelConfig | None) -> str:
    """Write the README of the model's folder: how to start it, call it and check it."""
    return "\n".join(
        [
            f"# {served.name}",
            "",
            *_description(served.first, config, ensemble),
            *_start(served),
            *_call(served, config, ensemble),
            *_more(served),
        ]
    )


def _description(
    artifact: ServedArtifact, config: ModelConfig, ensemble: ModelConfig | None
) -> list[str]:
    manifest = artifact.manifest
    lines = [f"{_text(artifact.path.name)}, served by Triton's {config.backend} backend."]
    if manifest is not None and manifest.checkpoint is not None:
        lines.append(f"Checkpoint: {_text(manifest.checkpoint.source)}.")
    if manifest is not None:
        check = manifest.check
        verdict = "not checked" if check is None else ("passed" if check.passed else "failed")
        on = "" if check is None else f"on {check.images} of {check.source}, {check.executed_on}"
        lines.append(f"Check: {' '.join(filter(None, (verdict, _text(on))))}.")
        if manifest.engine is not None:
            ran = "executed" if manifest.engine.executed else manifest.engine.reason
            lines.append(f"Engine: {_text(ran)}.")
    lines += ["", "| tensor | dtype | shape |", "|---|---|---|"]
    for kind, tensors in (("in", config.input), ("out", config.output)):
        for tensor in tensors:
            batch = f"1 to {config.max_batch_size}, " if config.max_batch_size else ""
            sizes = ", ".join(str(size) for size in tensor.dims)
            dtype = datatype_name(tensor.data_type).removeprefix("TYPE_")
            lines.append(f"| {kind}: {_code(tensor.name)} | {dtype} | [{batch}{sizes}] |")
    if ensemble is not None:
        lines += ["", f"`{ensemble.name}` takes bytes [h, w, c] and normalises them first."]
    return [*lines, ""]


def _text(text: str) -> str:
    """Keep what a manifest says from being Markdown: it would be followed as these lines are."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(name: str) -> str:
    """Show a tensor's name as code, where nothing in it ends that."""
    return f"`{name}`" if re.fullmatch(r"[\w./:-]+", name) else _text(ascii(name))


def _literal(name: str) -> str:
    """Write a tensor's name into a program: what it says is a string there, whatever it says."""
    return json.dumps(name, ensure_ascii=False) if name.isprintable() else ascii(name)


def _shell(folder: str) -> str:
    """Write a folder's name into a command line, where it is one word and no option."""
    return shlex.quote(f"./{folder}" if folder.startswith("-") else folder)


def _mounted(folder: str) -> str:
    """Write docker's option for a folder here; ``-v`` takes a colon for the end of its name."""
    place = f'"$PWD"/{shlex.quote(folder)}'
    if ":" in folder:
        return f"--mount type=bind,source={place},target=/models,readonly"
    return f"-v {place}:/models:ro"


def _start_command(served: Served) -> str:
    settings = served.settings
    options = ["--disable-auto-complete-config"]
    if settings.response_cache:
        options.append("--cache-config local,size=268435456")
    if served.first.version_compatible:
        options.append("--backend-config=tensorrt,version-compatible=true")
    if settings.cuda_graphs:
        options.append("--model-config-name=gpu")
    return " \\\n    ".join(
        [
            "docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002",
            f"{_mounted(served.repository.name)} {settings.release.image}",
            "tritonserver --model-repository=/models",
            *options,
        ]
    )


def _start(served: Served) -> list[str]:
    artifact, release = served.first, served.settings.release
    lines = [
        "## Start", "", "From the folder that holds the repository:", "", "```sh",
        _start_command(served), "```", "",
    ]  # fmt: skip
    if artifact.platform is Platform.PLAN:
        version = artifact.built_with[1] if artifact.built_with else "?"
        has = release.tensorrt or "a TensorRT that is not known to us"
        lines.append(
            f"Triton {release.name} has TensorRT {has}; the engine was built by {version}."
        )
    else:
        has = release.onnxruntime or "an onnxruntime that is not known to us"
        lines += [
            f"Triton {release.name} has onnxruntime {has}. Without a GPU leave `--gpus all` out. "
            "With `--model-config-name=gpu` the model loads on a GPU or not at all, where it would "
            "quietly run on the CPU otherwise.",
        ]
        since = artifact.row[Client.ONNXRUNTIME].attention_on_cuda if artifact.row else None
        if release.onnxruntime and since and numbers(release.onnxruntime) < numbers(since):
            lines.append("Its CUDA provider may run Attention on the CPU; later releases do not.")
    return [
        *lines, "", "Ready when this answers 200:", "", "```sh",
        "curl -s -o /dev/null -w '%{http_code}\\n' "
        f"localhost:8000/v2/models/{served.name}/ready", "```", "",
    ]  # fmt: skip


def _call(served: Served, config: ModelConfig, ensemble: ModelConfig | None) -> list[str]:
    return [
        "## Call", "", "`pip install 'msn-export[ort,triton]'`, then `python client.py PICTURE…`:",
        "", "```python", *_client(served, config, ensemble), "```", "",
    ]  # fmt: skip


def _client(served: Served, config: ModelConfig, ensemble: ModelConfig | None) -> list[str]:
    """Write a client of the model: pictures on its command line, what they are on its output."""
    called = ensemble or config
    source, output = called.input[0], config.output[0]
    gives, takes = _literal(source.name), _literal(output.name)
    datatype = datatype_name(source.data_type).removeprefix("TYPE_")
    bytes_in = source.name == InputFormat.UINT8.tensor
    batch = (
        "np.stack([images.read(Path(name), made) for name in sys.argv[1:]])"
        if bytes_in
        else "images.preprocess(sys.argv[1:], made)"
    )
    if not bytes_in and datatype == "FP16":
        batch += ".astype(np.float16)"
    labelled = output.name == LOGITS and output.label_filename
    imports = ["from msn_export.runtime.runner import top_k"] if labelled else []
    return [
        "import sys",
        "from pathlib import Path",
        "",
        *(["import numpy as np"] if "np." in batch else []),
        "import tritonclient.grpc as triton",
        "",
        *_preprocessing(served, imports),
        f"batch = {batch}",
        f'tensor = triton.InferInput({gives}, list(batch.shape), "{datatype}")',
        "tensor.set_data_from_numpy(batch)",
        f"wanted = triton.InferRequestedOutput({takes})",
        'client = triton.InferenceServerClient("localhost:8001")',
        f'answer = client.infer("{called.name}", [tensor], outputs=[wanted])',
        *(
            [
                f"best = top_k(answer.as_numpy({takes}), known.labels, known.scores, 3)",
                "print(*best, sep='\\n')",
            ]
            if labelled
            else [f"print(answer.as_numpy({takes}).shape)"]
        ),
    ]


def _preprocessing(served: Served, imports: list[str]) -> list[str]:
    """Write the client's lines that say how pictures are made into the model's input."""
    artifact, preprocessing = served.first, served.preprocessing
    file = f"{served.repository.name}/{served.name}/{served.file_of(artifact)}"
    call = "read" if artifact.manifest is not None else "read_stated"
    read = (
        [f"known = manifest.{call}(Path({_literal(file)}))"] if artifact.stated is not None else []
    )
    if preprocessing is not None and preprocessing == artifact.preprocessing:
        first = ["from msn_export import images, manifest", *imports]
        return [*first, "", *read, "made = known.preprocessing"]
    first = [
        f"from msn_export import images{', manifest' if read else ''}",
        f"from msn_export.preprocessing import {'Preprocessing' if preprocessing else 'preset'}",
        *imports,
        "from msn_export.spec import ImageSize",
        "",
        *read,
    ]
    if preprocessing is None:
        asked = 'preset("hf", ImageSize(HEIGHT, WIDTH), CHANNELS)'
        return [*first, f"made = {asked}  # assumed: nothing says what the model takes"]
    assumed = "  # assumed: nothing says how its pictures are made" if preprocessing.assumed else ""
    return [*first, f"made = {preprocessing!r}{assumed}"]


def _more(served: Served) -> list[str]:
    repository, name = _shell(served.repository.name), served.name
    return [
        "## A new version", "", "```sh",
        f"msn-export triton NEW.onnx -o {repository} --name {name} --model-version 2",
        f"curl -X POST localhost:8000/v2/repository/models/{name}/load", "```", "",
        "The second line is for a server started with `--model-control-mode=explicit "
        f"--load-model={name}`; one started with `--model-control-mode=poll` looks by itself. The "
        "newest version is served; the older one answers until the newer one is loaded.",
        "", "## Check", "", "```sh", f"msn-export triton --lint {repository}", "```", "",
    ]  # fmt: skip
