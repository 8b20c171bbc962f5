"""Write docs/formats.md: what is read, noted and refused, from the tables in the code and here.

python scripts/formats.py
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msn_export.models.checkpoint import ADAPTER_FOLDER, FOREIGN_FOLDERS, WEIGHTS
from msn_export.models.config import FAMILIES, READS, Pooling
from msn_export.models.state_dict import LAYOUTS, REFUSED, SPARE
from msn_export.models.weights import CONTAINERS, INSIDE, PREFIXES, PROBE
from msn_export.processor_config import FIELDS, TYPES

PAGE = Path("docs/formats.md")


@dataclass(frozen=True, slots=True)
class Classifier:
    """The modules a classifier is told by, what it reads (``READS``), and who writes it."""

    modules: tuple[str, ...]
    pooling: Pooling
    writers: str


CLASSIFIERS = (
    Classifier(("classifier",), "cls", "transformers, msn-export"),
    Classifier(("head",), "cls", "the MAE code base with --cls_token, DeiT, timm"),
    Classifier(("heads.head",), "cls", "torchvision"),
    Classifier(
        ("fc_norm", "head"), "patches", "the MAE code base with --global_pool, timm's average pool"
    ),
    Classifier(
        ("classifier.norm", "classifier.linear"),
        "blocks",
        "facebookresearch/msn linear_eval.py (a state dict classifier beside target_encoder)",
    ),
)


@dataclass(frozen=True, slots=True)
class Form:
    """A form of graph that other tools write: ``verdict`` is what becomes of it, ``done`` how."""

    name: str
    verdict: Literal["read", "noted", "refused"]
    done: str


# Every row has a test in tests/graph/test_opset_foreign.py
FORMS = (
    Form("opset 11 and 12", "read", "raised to opset 23; LayerNorm written out becomes one"),
    Form("Softmax as Exp, ReduceSum and Div", "read", "becomes one Softmax"),
    Form("Softmax over [b * h * n, n]", "read", "becomes one Softmax over the last axis"),
    Form("keys transposed as [b * h, n, d]", "read", "become one Transpose"),
    Form("opset 24 and later", "read", "written as opset 23, if its operators are the same there"),
    Form("nodes out of order", "read", "sorted"),
    Form("no value_info, or a wrong one", "read", "types and shapes are computed from the input"),
    Form("shapes computed from the running batch", "read", "become constants"),
    Form("operators on constants (Resize)", "read", "computed once, in onnxruntime"),
    Form("height and width left open (optimum)", "noted",
         "fixed at the size of the position embedding"),
    Form("float16 input", "read", "pictures are fed as float16"),
    Form("fp16 by onnxconverter-common or onnxruntime.transformers", "read", "as it is typed"),
    Form("softmax kept in fp32 (op_block_list)", "noted",
         "a fused kernel computes it in its own precision"),
    Form("symmetric int8 Q/DQ of onnxruntime", "noted", "biases become floats; trt types the rest"),
    Form("Q/DQ inside attention", "refused", "trt --allow-unfused compiles it unfused"),
    Form("asymmetric or uint8 Q/DQ", "refused", "quantise symmetrically to int8"),
    Form("dynamic quantisation", "refused", "quantise the fp32 graph with msn-export calibrate"),
    Form("QOperator quantisation", "refused", "quantise the fp32 graph with msn-export calibrate"),
    Form("attention-pooling head", "refused", "export the model without that head"),
    Form("uint8 [b, c, h, w] input", "refused", "uint8 images are taken as [b, h, w, c]"),
    Form("float [b, h, w, c] input", "refused", "float images are taken as [b, c, h, w]"),
    Form("output of one axis, or of integers", "refused", "export the scores before argmax"),
    Form("operators of onnxruntime (com.microsoft)", "refused",
         "validate and drift read it; else export it again without onnxruntime's optimiser"),
)  # fmt: skip


def table(*titles: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Write rows in Markdown."""
    lines = [titles, ("---",) * len(titles), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def code(*names: str) -> str:
    """Write names as code."""
    return ", ".join(f"`{name}`" for name in names)


def checkpoints() -> list[str]:
    """Describe checkpoints: names of weights, classifiers, wrappers, what is left or refused."""
    return [
        "## Checkpoints",
        "",
        f"A Hugging Face folder or hub id, or a file ({', '.join(WEIGHTS)}). It must hold "
        "every weight with its shape, and no other key except those listed below. The message names each difference.",
        "",
        "### Families of models",
        "",
        "`model_type` in config.json selects the family. A field that is missing there has the default of the family. "
        "All families have the same block, heads and names of weights.",
        "",
        *table(
            "model_type", "prefix of an encoder's keys", "default", "not read, with a note", "",
            rows=((code(one.model_type), code(one.prefix),
                   ", ".join(f"`{name}` {value:g}" for name, value in one.defaults.items()),
                   ", ".join(f"`{name}`: keys {what}" for name, what in one.ignored.items()),
                   one.note or "the product's subject") for one in FAMILIES),
        ),
        "### Names of weights",
        "",
        *table(
            "written by", "a block's keys", "within a block", "outside",
            rows=((layout.writers, code(layout.block), code(*layout.inside), code(*layout.outside))
                  for layout in LAYOUTS),
        ),
        "### Classifiers",
        "",
        "Each computes what its writer's code computes. The output is `logits`. A note says what was read. The "
        f"BatchNorm of MAE's linear probe ({code(*sorted(PROBE))}) is folded into `head`.",
        "",
        *table(
            "weights", "reads", "written by",
            rows=((code(*one.modules), READS[one.pooling], one.writers) for one in CLASSIFIERS),
        ),
        "### Wrappers",
        "",
        "Wrappers are removed, single and nested, with a note. If a file holds several models, the first of this list is "
        "read; `--weights KEY` selects another (any dictionary of the file, also one that is not listed).",
        "",
        *table("dictionary", "written by", rows=((code(name), who) for name, who in CONTAINERS.items())),
        *table("prefix of every key", "written by",
               rows=((code(f"{name}."), who) for name, who in PREFIXES.items())),
        *table("within keys", "written by",
               rows=((code(f"{name}."), who) for name, who in INSIDE.items())),
        "A field of any other name that holds the whole model is removed too. If there are several, `--weights` must "
        "select one.",
        "",
        "`argparse.Namespace`, which holds the options of training scripts, is not read. A pickle that "
        "names any other class is refused; the message names the class.",
        "",
        "### Keys that are not weights",
        "",
        *table(
            "keys", "", "treatment",
            rows=[
                *((code(*one.example.split(", ")), "noted", f"not read: keys {one.what}") for one in SPARE),
                *((code(*one.example.split(", ")), "refused", f"the file {one.what}") for one in REFUSED),
            ],
        ),
        "### Folders that are not a model",
        "",
        *table(
            "a file in it", "refused because the folder",
            rows=((code(one.sign), one.what) for one in (ADAPTER_FOLDER, *FOREIGN_FOLDERS)),
        ),
        "A folder with subfolders such as `checkpoint-500/` is refused too; the message names the best or the last.",
        "",
    ]  # fmt: skip


def preprocessing() -> list[str]:
    """Describe the fields of a processor's configuration."""
    return [
        "## Preprocessing",
        "",
        "Read from `processor_config.json`, else from `preprocessor_config.json`. Pixels equal those of transformers' "
        f"processor. A missing field has the default of the processor's type: {code(*TYPES)}. `null` turns a step "
        "(`do_…`) off, and is refused for a required value, as in transformers.",
        "",
        *table(
            "field", "", "",
            rows=((code(field.name), field.treatment, field.what) for field in FIELDS),
        ),
    ]  # fmt: skip


def graphs() -> list[str]:
    """Describe the forms of graphs that other tools write."""
    return [
        "## Graphs of other tools",
        "",
        "Every command that takes an `.onnx` file takes them, if it recognises the structure of a ViT.",
        "",
        *table(
            "form", "", "",
            rows=((form.name, form.verdict, form.done) for form in FORMS),
        ),
    ]  # fmt: skip


def page() -> str:
    """Compose the page."""
    head = [
        "# Formats that are read",
        "",
        "Written by `python scripts/formats.py` from the tables in the code.",
        "",
    ]
    return "\n".join([*head, *checkpoints(), *preprocessing(), *graphs()]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
