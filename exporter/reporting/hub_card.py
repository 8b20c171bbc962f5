"""Cards for the hub: the YAML of every card, and the README.md of a model's folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from msn_export import __version__
from msn_export.hub_folder import GRAPHS
from msn_export.reporting.describe_fit import fit_rows
from msn_export.spec import Dtype, Head
from msn_export.version_table import Client

if TYPE_CHECKING:
    from msn_export.fit_record import FitRecord
    from msn_export.manifest import Manifest

# transformers.js takes a graph by these names
JS_DTYPES = {Dtype.FP32: "fp32", Dtype.FP16: "fp16", Dtype.INT8: "q8"}


CLASSIFICATION = "image-classification"
# of a checkpoint that was read from the hub: its id and the revision's hash
_HUB_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


def task_of(manifest: Manifest) -> str:
    """Give the task as hubs call it: the pipeline that runs the model."""
    is_classifier = manifest.outputs[0].name == Head.LOGITS.output
    return CLASSIFICATION if is_classifier else "image-feature-extraction"


def hub_id(manifest: Manifest) -> str | None:
    """Give the id of the checkpoint on the hub; None where it is not from a hub."""
    origin = manifest.checkpoint
    found = _HUB_SOURCE.fullmatch(origin.source) if origin is not None else None
    return found[1] if found is not None else None


def front_matter(
    manifest: Manifest,
    name: str,
    base_model: str | None,
    tags: Sequence[str],
    library: str | None = None,
) -> str:
    """Write the YAML at the head of a card, which the hub reads, with its lines of dashes.

    Args:
        manifest: of the artifact that the card is of.
        name: the model's, for the accuracy that was measured.
        base_model: the checkpoint's id on the hub, if it has one.
        tags: what the files are for the hub, as ``onnx``.
        library: the hub's name of what loads them.
    """
    from huggingface_hub import ModelCardData

    measured = _measured(manifest)
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        pipeline_tag=task_of(manifest),
        tags=[*tags, "vit_msn", "msn-export"],
        metrics=["accuracy"] if measured else None,
        eval_results=measured,
        model_name=name if measured else None,
    )
    return f"---\n{data.to_yaml(line_break=chr(10)).strip()}\n---"


def _measured(manifest: Manifest) -> list[Any] | None:
    from huggingface_hub import EvalResult

    fit = manifest.fit
    if fit is None or fit.accuracy is None:
        return None
    how = _on_this_machine(fit.accuracy.how)
    return [
        EvalResult(
            task_type=task_of(manifest), dataset_type="imagefolder",
            dataset_name=PurePath(fit.test or fit.labelled).name, metric_type="accuracy",
            metric_value=round(fit.accuracy.top1, 4),
            metric_name=f"top-1 of {fit.accuracy.images} images, {how}",
        )
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubCard:
    """A card: the model's ``name`` on the hub or of its folder, its graphs' manifests by dtype.

    ``base_model`` is the hub id of the checkpoint, None where it is not from a hub; ``notes`` come
    before those of the graphs.
    """

    name: str
    manifests: Mapping[Dtype, Manifest]
    base_model: str | None
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Manifest:
        return next(iter(self.manifests.values()))

    @property
    def is_classifier(self) -> bool:
        return self.task == CLASSIFICATION

    @property
    def task(self) -> str:
        return task_of(self.first)

    @property
    def fit(self) -> FitRecord | None:
        """The classifier that was fitted, in a graph as it was measured."""
        return self.first.fit

    def __str__(self) -> str:
        front = front_matter(
            self.first, self.name.rpartition("/")[2], self.base_model, ("onnx",), "transformers.js"
        )
        return "\n".join([front, *self._body()]) + "\n"

    def _body(self) -> Iterator[str]:
        classes = f"image classifier of {len(self.first.labels)} classes"
        kind = classes if self.is_classifier else "image encoder"
        origin = f" of [{self.base_model}](https://huggingface.co/{self.base_model})"
        yield from ("", f"# {_cell(self.name.rpartition('/')[2])}", "")
        yield (
            f"A ViT-MSN {kind}{origin if self.base_model else ''} as ONNX graphs, exported and "
            f"checked with msn-export {__version__}."
        )
        yield from ("", "## Graphs", "", *self._graphs(), "", "## Use", "", *self._use())
        yield from ("", "## Pictures", "", *self._pictures())
        if self.fit is not None:
            yield from ("", "## Classifier", "")
            for name, text in fit_rows(self.fit, itself=True):
                text = _cell(_on_this_machine(text))  # noqa: PLW2901
                yield f"* {name}: {text}" if name else f"  {text}"
        notes = dict.fromkeys(self.notes)
        notes |= dict.fromkeys(note for one in self.manifests.values() for note in one.notes)
        if notes:
            yield from ("", "## Notes", "", *(f"* {_cell(_on_this_machine(n))}" for n in notes))

    def _graphs(self) -> Iterator[str]:
        yield (
            "| file | dtype | MB | compared with | images | relative error | least cosine "
            "| onnxruntime | transformers.js |"
        )
        yield "|---" * 9 + "|"
        for dtype, manifest in self.manifests.items():
            check, row = manifest.check, manifest.row
            assert check is not None  # none is written unchecked
            assert row is not None
            reference = "PyTorch" if manifest.quantization is None else "the fp32 graph"
            cells = (
                f"`{GRAPHS[dtype]}`", dtype, f"{manifest.bytes / 1e6:.1f}", reference,
                check.images, _number(check.relative, ".1e"), _number(check.cosine_min, ".6f"),
                row[Client.ONNXRUNTIME], row[Client.TRANSFORMERS_JS],
            )  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |"
        output = self.first.outputs[0]
        (taken,) = self.first.inputs
        yield ""
        yield (
            f"Input `{taken.name}` {_shape(taken.shape)}, output `{output.name}` "
            f"{_shape(output.shape)}. The JSON file beside each graph is its manifest."
        )

    def _use(self) -> Iterator[str]:
        file = next(iter(self.manifests))
        names = ", ".join(f"`{JS_DTYPES[dtype]}`" for dtype in self.manifests)
        auto = "ImageClassification" if self.is_classifier else "FeatureExtraction"
        yield from (
            "```js", 'import { pipeline } from "@huggingface/transformers";',
            f'const run = await pipeline("{self.task}", "{self.name}", '
            f'{{ dtype: "{JS_DTYPES[file]}" }});', 'console.log(await run("photograph.jpg"));',
            "```", "", f"`dtype` is one of {names}.", "",
            "```python", f"from optimum.onnxruntime import ORTModelFor{auto}", "",
            f'model = ORTModelFor{auto}.from_pretrained("{self.name}", subfolder="onnx", '
            f'file_name="{PurePath(GRAPHS[file]).name}")',
            "```", "", "```python", "from msn_export.runtime import open_runner", "",
            'with open_runner("the folder") as runner:',
            f'    print(runner("photograph.jpg").{self.first.outputs[0].name})', "```",
        )  # fmt: skip

    def _pictures(self) -> Iterator[str]:
        preprocessing = self.first.preprocessing
        assert preprocessing is not None
        yield (
            f"A picture is {preprocessing.geometry}; {preprocessing.values}. Clients resize "
            "differently: transformers.js does not smooth a picture that it makes smaller. Give "
            "pictures of the model's size where numbers have to agree."
        )


_PATH = re.compile(r"(?<![\w/])/(?:[^\s/,;:]+/)+")


def _on_this_machine(text: str) -> str:
    """Leave the folders out of what was noted: a card is for others."""
    return _PATH.sub("", text)


def _cell(text: str) -> str:
    """Escape what Markdown and HTML would read in a text of files."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", " ".join(printable.split()))


def _number(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
