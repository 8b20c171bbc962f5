"""The least version of each runtime of ONNX files that takes the graphs of a target and dtype.

The facts lie in ``version_table.json``. ``scripts/version_table.py`` writes it: it runs graphs of
every target and dtype in the versions in question. All that names a version reads it here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Literal

from msn_export.schema import from_plain
from msn_export.spec import Dtype, Target

FILE = Path(__file__).with_suffix(".json")


class Client(StrEnum):
    """A runtime that users load an ONNX file with."""

    ONNXRUNTIME = "onnxruntime"
    NODE = "onnxruntime-node"
    WEB = "onnxruntime-web"
    OPENVINO = "openvino"
    TRANSFORMERS_JS = "transformers.js"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"

    @property
    def full_name(self) -> str:
        """Its name as its makers write it."""
        return _NAMES.get(self, self.value)

    @property
    def is_compiler(self) -> bool:
        """True for what ``msn-export trt`` compiles with.

        A graph that such a client's own parser does not take has attention in fp32, for which
        TensorRT has no kernel; ``trt`` types it, or lets the builder split the operator.
        """
        return self in {Client.TENSORRT, Client.TENSORRT_RTX}


_NAMES = {
    Client.OPENVINO: "OpenVINO",
    Client.TENSORRT: "TensorRT",
    Client.TENSORRT_RTX: "TensorRT-RTX",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """The least version of one client for one target and dtype; None where it has none.

    ``evidence`` is ``run`` where that version ran the graphs and ``before``, the version before it,
    did not, for the reason in ``fails``; ``least tried`` where no version before it can be tried;
    ``read`` where ``source`` says so. ``newest`` is the last version that was run.
    ``note`` says what else the user of it must know. ``attention_on_cuda`` is onnxruntime's first
    version whose CUDA provider has a kernel for ``Attention``, where the graph has that operator.
    """

    least: str | None
    evidence: Literal["run", "least tried", "read"]
    before: str | None = None
    fails: str = ""
    newest: str | None = None
    source: str = ""
    note: str = ""
    attention_on_cuda: str | None = None

    def __str__(self) -> str:
        return f"≥ {self.least}" if self.least else "none"

    def takes(self, version: str) -> bool:
        """True if a version is at or above the least."""
        return self.least is not None and numbers(version) >= numbers(self.least)


Row = Mapping[Client, Cell]
Table = Mapping[Target, Mapping[Dtype, Row]]


@cache
def table() -> Table:
    """Read the whole table, by target, dtype and client."""
    plain = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        Target(target): {
            Dtype(dtype): {
                Client(client): from_plain(Cell, cell, f"{FILE.name}: {target}.{dtype}.{client}")
                for client, cell in row.items()
            }
            for dtype, row in rows.items()
        }
        for target, rows in plain.items()
    }


def row_of(target: Target | None, dtype: Dtype, base: Dtype | None = None) -> Row | None:
    """Give a row, None where there is none; of a quantised graph ``base`` is the rest's type.

    The table has int8 and fp8 beside fp16 for TensorRT, beside fp32 for onnxruntime and portable. A
    graph that is bf16 beside them also takes what bf16 graphs do.
    """
    rows = table()[target] if target is not None else {}
    if base is not Dtype.BF16 or not {dtype, Dtype.BF16} <= rows.keys():
        return rows.get(dtype)
    pairs = {client: (cell, rows[Dtype.BF16][client]) for client, cell in rows[dtype].items()}
    return {client: max(cells, key=_demand) for client, cells in pairs.items()}


def row_by_opset(opset: int, dtype: Dtype) -> Row | None:
    """Give the row of a graph that does not say its target; None where no row is like it.

    Its form of attention is unknown. It makes no difference to onnxruntime.
    """
    return row_of(Target.TENSORRT if opset == Target.TENSORRT.opset else None, dtype)


def _demand(cell: Cell) -> tuple[bool, tuple[int, ...]]:
    return cell.least is None, numbers(cell.least)


def least_versions(row: Row) -> dict[str, str | None]:
    """Give each client's least version, as a manifest holds them."""
    return {client.value: cell.least for client, cell in row.items()}


NO_KERNEL = "no kernel for attention in fp32"


def in_words(row: Row) -> str:
    """Name the clients that take a graph, each with its least version, then those that do not."""
    taking = [f"{client.full_name} {cell}" for client, cell in row.items() if cell.least]
    without = [client for client, cell in row.items() if not cell.least]
    text = ", ".join(taking)
    if others := [client.full_name for client in without if not client.is_compiler]:
        text += f"; not in {', '.join(others)}"
    if compilers := [client.full_name for client in without if client.is_compiler]:
        text += f"; not as it is in a plain parser of {', '.join(compilers)} ({NO_KERNEL}):"
        text += " msn-export trt builds it"
    return text


def too_old(row: Row | None, client: Client, here: str) -> str | None:
    """Name the version that takes a graph the installed one does not; None where it does.

    Args:
        row: the graph's; None where it is not known.
        client: the runtime.
        here: its version.

    Returns:
        The rest of a sentence that begins with the file.
    """
    cell = row[client] if row is not None else None
    if cell is None or cell.least is None or cell.takes(here):
        return None
    instead = ""
    if table()[Target.PORTABLE][Dtype.FP32][client].takes(here):
        instead = f", or export the model with --target portable, which {here} loads"
    return (
        f"needs {client.full_name} {cell.least} or later, and here is {here}; upgrade it{instead}"
    )


def numbers(version: str | None) -> tuple[int, ...]:
    """Read the numbers a version begins with: ``10.13.3.9.post1`` is (10, 13, 3, 9)."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version or "")
    return tuple(int(part) for part in match[0].split(".")[:4]) if match else ()
