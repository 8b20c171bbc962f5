"""The README of a served model: how to start it, call it and check it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat
from msn_export.triton_server import config as messages
from msn_export.triton_server.config import (
    ATTENTION_CUDA_SINCE,
    ATTENTION_OPSET,
    ModelConfig,
    Settings,
    numbers,
)
from msn_export.triton_server.model import LOGITS, Platform, ServedArtifact


@dataclass(frozen=True, slots=True)
class About:
    """What a README tells of: the model, and the ensemble in front of it where there is one.

    ``preprocessing`` is what its client does, where that is known.
    """

    repository: Path
    config: ModelConfig
    artifact: ServedArtifact
    file: str
    settings: Settings
    ensemble: ModelConfig | None = None
    preprocessing: Preprocessing | None = None


def readme(about: About) -> str:
    """Write the README of one model's folder."""
    return "\n".join(
        [
            f"# {about.config.name}",
            "",
            *_what(about),
            *_start(about),
            *_call(about),
            *_more(about),
        ]
    )


def _what(about: About) -> list[str]:
    artifact, config = about.artifact, about.config
    known = artifact.manifest
    lines = [f"{_text(artifact.path.name)}, served by Triton's {config.backend} backend."]
    if known is not None and known.checkpoint is not None:
        lines.append(f"Checkpoint: {_text(known.checkpoint.source)}.")
    if known is not None:
        check = known.check
        verdict = "not checked" if check is None else ("passed" if check.passed else "failed")
        on = "" if check is None else f"on {check.images} of {check.source}, {check.executed_on}"
        lines.append(f"Check: {' '.join(filter(None, (verdict, _text(on))))}.")
        if known.engine is not None:
            ran = "executed" if known.engine.executed else known.engine.reason
            lines.append(f"Engine: {_text(ran)}.")
    lines += ["", "| tensor | dtype | shape |", "|---|---|---|"]
    for kind, tensors in (("in", config.input), ("out", config.output)):
        for tensor in tensors:
            batch = f"1 to {config.max_batch_size}, " if config.max_batch_size else ""
            sizes = ", ".join(str(size) for size in tensor.dims)
            dtype = messages.datatype_name(tensor.data_type).removeprefix("TYPE_")
            lines.append(f"| {kind}: {_code(tensor.name)} | {dtype} | [{batch}{sizes}] |")
    if about.ensemble is not None:
        lines += ["", f"`{about.ensemble.name}` takes bytes [h, w, c] and normalises them first."]
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


def start_command(repository: str, artifact: ServedArtifact, settings: Settings) -> str:
    """Give the command that starts the server in its container."""
    options = ["--disable-auto-complete-config"]
    if settings.response_cache:
        options.append("--cache-config local,size=268435456")
    if artifact.version_compatible:
        options.append("--backend-config=tensorrt,version-compatible=true")
    if settings.cuda_graphs:
        options.append("--model-config-name=gpu")
    return " \\\n    ".join(
        [
            "docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002",
            f'-v "$PWD/{repository}:/models:ro" {settings.release.image}',
            "tritonserver --model-repository=/models",
            *options,
        ]
    )


def _start(about: About) -> list[str]:
    artifact, settings = about.artifact, about.settings
    lines = [
        "## Start", "", "From the folder that holds the repository:", "", "```sh",
        start_command(about.repository.name, artifact, settings), "```", "",
    ]  # fmt: skip
    release = settings.release
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
        early = numbers(release.onnxruntime)[:2] < ATTENTION_CUDA_SINCE
        if release.onnxruntime and early and (artifact.opset or 0) >= ATTENTION_OPSET:
            lines.append("Its CUDA provider may run Attention on the CPU; later releases do not.")
    return [
        *lines, "", "Ready when this answers 200:", "", "```sh",
        "curl -s -o /dev/null -w '%{http_code}\\n' "
        f"localhost:8000/v2/models/{about.config.name}/ready", "```", "",
    ]  # fmt: skip


def _call(about: About) -> list[str]:
    return [
        "## Call", "", "`pip install 'msn-export[ort,triton]'`, then `python client.py PICTURE…`:",
        "", "```python", *client(about).splitlines(), "```", "",
    ]  # fmt: skip


def client(about: About) -> str:
    """Write a client of the model: pictures on its command line, what they are on its output."""
    called = about.ensemble or about.config
    source, output = called.input[0], about.config.output[0]
    gives, takes = _literal(source.name), _literal(output.name)
    datatype = messages.datatype_name(source.data_type).removeprefix("TYPE_")
    bytes_in = source.name == InputFormat.UINT8.tensor
    batch = (
        "np.stack([images.read(Path(name), made) for name in sys.argv[1:]])"
        if bytes_in
        else "images.preprocess(sys.argv[1:], made)"
    )
    if not bytes_in and datatype == "FP16":
        batch += ".astype(np.float16)"
    labelled = output.name == LOGITS and output.label_filename
    return (
        "\n".join(
            [
                "import sys",
                "from pathlib import Path",
                "",
                *(["import numpy as np"] if "np." in batch else []),
                "import tritonclient.grpc as triton",
                "",
                *_made(about, ["from msn_export.runtime.runner import top_k"] if labelled else []),
                f"batch = {batch}",
                f'tensor = triton.InferInput({gives}, list(batch.shape), "{datatype}")',
                "tensor.set_data_from_numpy(batch)",
                f"wanted = triton.InferRequestedOutput({takes})",
                'client = triton.InferenceServerClient("localhost:8001")',
                f'answer = client.infer("{called.name}", [tensor], outputs=[wanted])',
                *(
                    [f"best = top_k(answer.as_numpy({takes}), known.labels, known.scores, 3)"]
                    if labelled
                    else []
                ),
                "print(*best, sep='\\n')" if labelled else f"print(answer.as_numpy({takes}).shape)",
            ]
        )
        + "\n"
    )


def _made(about: About, imports: list[str]) -> list[str]:
    """Say in the client what the model is and how pictures are made into its input."""
    artifact, made = about.artifact, about.preprocessing
    file = f"{about.repository.name}/{about.config.name}/{about.file}"
    known = [f'known = manifest.read(Path("{file}"))'] if artifact.manifest is not None else []
    if made is not None and made == artifact.preprocessing:
        first = ["from msn_export import images, manifest", *imports]
        return [*first, "", *known, "made = known.preprocessing"]
    first = [
        f"from msn_export import images{', manifest' if known else ''}",
        f"from msn_export.preprocessing import {'Preprocessing' if made else 'preset'}",
        *imports,
        "from msn_export.spec import ImageSize",
        "",
        *known,
    ]
    if made is None:
        asked = 'preset("hf", ImageSize(HEIGHT, WIDTH), CHANNELS)'
        return [*first, f"made = {asked}  # assumed: nothing says what the model takes"]
    assumed = "  # assumed: nothing says how its pictures are made" if made.assumed else ""
    return [*first, f"made = {made!r}{assumed}"]


def _more(about: About) -> list[str]:
    repository, name = about.repository.name, about.config.name
    return [
        "## A new version", "", "```sh",
        f"msn-export triton NEW.onnx -o {repository} --name {name} --model-version 2",
        f"curl -X POST localhost:8000/v2/repository/models/{name}/load", "```", "",
        "The second line is for a server started with `--model-control-mode=explicit "
        f"--load-model={name}`; one started with `--model-control-mode=poll` looks by itself. The "
        "newest version is served; the older one answers until the newer one is loaded.",
        "", "## Check", "", "```sh", f"msn-export triton --lint {repository}", "```", "",
    ]  # fmt: skip
