"""Write docs/schemas/COMMAND.json: JSON Schema of what each command prints with --json.

    python scripts/json_schemas.py

The schemas are made of the records' own annotations, so that they cannot differ from what is printed.
"""

import dataclasses
import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from msn_export.benchmark.results import Bench
from msn_export.commands.doctor import Diagnosis
from msn_export.commands.evaluate import Evaluated
from msn_export.commands.hub import HubFolder
from msn_export.commands.search import Searched
from msn_export.commands.triton import Written
from msn_export.compare.drift import Drift
from msn_export.compare.inspection import Inspection
from msn_export.compare.sides import Validation
from msn_export.embedding.job import Embedded
from msn_export.fit_record import HeldOutAccuracy
from msn_export.manifest import Manifest
from msn_export.runtime import openvino  # noqa: F401  its names are in annotations
from msn_export.triton_server.checks import Issue

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
DRAFT = "https://json-schema.org/draft/2020-12/schema"
SCALARS = {
    str: "string", Path: "string", bool: "boolean", int: "integer", type(None): "null",
    float: ["number", "null"],  # what is no number is null
}  # fmt: skip
Schema = dict[str, Any]
# Annotations may name what their modules import for type checkers alone; no two of our classes have
# one name (tests/contracts/test_architecture.py)
MODULES = [module for name, module in sorted(sys.modules.items()) if name.startswith("msn_export.")]
NAMES = {
    name: value for module in MODULES for name, value in vars(module).items() if name[0].isupper()
}


def schema_of(hint: Any, records: dict[str, Schema]) -> Schema:
    """Describe a value; the schemas of the records in it are put into ``records``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return schema_of(inner[0], records)
    if origin in {typing.Union, types.UnionType}:
        return {"anyOf": [schema_of(one, records) for one in inner]}
    if origin is tuple and inner[-1] is not Ellipsis:
        items = [schema_of(one, records) for one in inner]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in {tuple, list}:
        return {"type": "array", "items": schema_of(inner[0], records)}
    if origin in {dict, Mapping}:
        return {"type": "object", "additionalProperties": schema_of(inner[1], records)}
    if dataclasses.is_dataclass(hint):
        if hint.__name__ not in records:
            records[hint.__name__] = {}  # a record may hold others of its kind
            records[hint.__name__] = record_of(hint, records)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return scalar_of(hint, origin, inner)


def scalar_of(hint: Any, origin: Any, inner: tuple[Any, ...]) -> Schema:
    if hint is Any or hint is object:
        return {}
    if origin is Literal:
        return {"enum": list(inner)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if hint not in SCALARS:
        raise TypeError(f"{hint} has no place in JSON")
    return {"type": SCALARS[hint]}


def record_of(kind: Any, records: dict[str, Schema]) -> Schema:
    """Describe a dataclass: every field is printed, and no other."""
    hints = typing.get_type_hints(kind, localns=NAMES, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return {
        "description": " ".join(inspect.getdoc(kind).split()),
        "type": "object",
        "properties": {name: schema_of(hints[name], records) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def with_fields(schema: Schema, **fields: Schema) -> Schema:
    return {
        **schema,
        "properties": {**schema["properties"], **fields},
        "required": [
            *schema["required"],
            *(name for name in fields if name not in schema["required"]),
        ],
    }


def schemas() -> dict[str, Schema]:
    """Give the schema of each command that takes --json."""
    text, flag = {"type": "string"}, {"type": "boolean"}
    found = {}

    def add(command: str, kind: Any, **fields: Schema) -> None:
        records: dict[str, Schema] = {}
        schema = with_fields(record_of(kind, records), **fields)
        found[command] = {
            "$schema": DRAFT,
            "title": f"msn-export {command} --json",
            **schema,
            "$defs": records,
        }

    for command in ("onnx", "trt", "calibrate"):
        add(command, Manifest)
    records: dict[str, Schema] = {}
    add(
        "fit", Manifest, accuracy=schema_of(HeldOutAccuracy | None, records), classes={"type": "array", "items": text},
        shots={"type": ["integer", "null"]}, C={"type": "number"},
    )  # fmt: skip
    found["fit"]["$defs"] |= records
    add("validate", Validation)
    add("drift", Drift, passed=flag)
    add("inspect", Inspection, other_bytes={"type": ["integer", "null"]})
    one = found["inspect"]
    single = {name: part for name, part in one.items() if name not in {"$schema", "title", "$defs"}}
    both = {
        "type": "object",
        "properties": {"artifacts": {"type": "array", "items": {"$ref": "#/$defs/Inspection"}}},
        "required": ["artifacts"],
        "additionalProperties": False,
    }
    found["inspect"] = {
        "$schema": DRAFT, "title": one["title"], "anyOf": [{"$ref": "#/$defs/Inspection"}, both],
        "$defs": {"Inspection": single, **one["$defs"]},
    }  # fmt: skip
    for command, kind in {
        "bench": Bench, "embed": Embedded, "evaluate": Evaluated, "search": Searched, "hub": HubFolder,
        "triton": Written, "doctor": Diagnosis,
    }.items():  # fmt: skip
        add(command, kind)
    records = {}
    issues = {"type": "array", "items": schema_of(Issue, records)}
    linted = {
        "type": "object",
        "properties": {"repository": text, "passed": flag, "findings": issues},
        "required": ["repository", "passed", "findings"],
        "additionalProperties": False,
    }
    written = found["triton"]
    single = {
        name: part for name, part in written.items() if name not in {"$schema", "title", "$defs"}
    }
    found["triton"] = {
        "$schema": DRAFT, "title": written["title"], "anyOf": [single, linted],
        "$defs": {**written["$defs"], **records},
    }  # fmt: skip
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for command, schema in schemas().items():
        (FOLDER / f"{command}.json").write_text(
            json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
