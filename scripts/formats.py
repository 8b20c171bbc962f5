"""Write docs/formats.md: what is read, noted and refused, from the tables in the code.

python scripts/formats.py
"""

from collections.abc import Iterable
from pathlib import Path

from msn_export.graph.opset import FORMS
from msn_export.models.checkpoint import ADAPTER_FOLDER, FOREIGN_FOLDERS, WEIGHTS
from msn_export.models.config import FAMILIES, READS
from msn_export.models.state_dict import CLASSIFIERS, LAYOUTS, REFUSED, SPARE
from msn_export.models.weights import CONTAINERS, INSIDE, PREFIXES, PROBE
from msn_export.processor_config import FIELDS, TYPES

PAGE = Path("docs/formats.md")


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
