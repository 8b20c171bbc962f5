"""Run tiny graphs of every target and dtype in other runtimes, and write the version table.

    python scripts/version_table.py --python python3.8 --python python3.10

Each client is tried in the last release of every minor version, then in the patches between the
last that failed and the first that ran. A trial is one graph in a process of its own; what came of
it is kept in build/clients/trials.json, so that a run goes on where the last one ended. Writes
exporter/version_table.json and the tables in docs/clients.md. ``--pages`` writes the
pages alone.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import clients
import numpy as np
import onnx
from clients import CLIENTS, ClientError
from pages import replace_part

from msn_export import images, version_table
from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.jobs import FIRST_BF16
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.preprocessing import preset
from msn_export.schema import to_plain
from msn_export.spec import Dtype, Head, ImageSize, InputFormat, Target
from msn_export.version_table import FILE, Cell, Client, Table, numbers

GRAPHS = clients.FOLDER / "graphs"
PAGE = Path("docs/clients.md")
KEPT = clients.FOLDER / "trials.json"
BATCH = 3
# Relative error against the fp32 graph in this environment's onnxruntime. They only tell a runtime
# that computes the graph from one that does not: in onnxruntime 1.32 fp16 errs by 1e-3 and 8 bits by
# 0.1 on a model of random weights.
LIMITS = {Dtype.FP32: 1e-4, Dtype.FP16: 1e-2, Dtype.BF16: 5e-2, Dtype.INT8: 0.2, Dtype.FP8: 0.2}
HEADS = (Head.CLS, Head.MEAN, Head.TOKENS, Head.LOGITS, Head.FEATURES)


def rows() -> Iterator[tuple[Target, Dtype]]:
    """List what can be written: opset 17 has neither bf16 nor fp8."""
    for target in Target:
        for dtype in Dtype:
            if target.opset >= FIRST_BF16 or dtype not in {Dtype.BF16, Dtype.FP8}:
                yield target, dtype


@dataclass(frozen=True, slots=True)
class Trial:
    """One file: the classifier with a float input, or all outputs with a uint8 input."""

    target: Target
    dtype: Dtype
    input_format: InputFormat

    @property
    def path(self) -> Path:
        return GRAPHS / f"{self.target}-{self.dtype}-{self.input_format}.onnx"

    @property
    def images(self) -> np.ndarray:
        """Make a batch of photographs: of noise, 8 bits would hold nothing."""
        paths = sorted((GRAPHS / "photographs").iterdir())[:BATCH]
        preprocessing = preset("hf", ImageSize(32, 32))
        return images.model_input(
            images.decode(paths, preprocessing), preprocessing, self.input_format
        )

    @property
    def content(self) -> str:
        """Hash the graph, without what the file says besides."""
        model = onnx.load(self.path)
        graph = model.graph.SerializeToString(deterministic=True)
        return hashlib.sha256(graph + bytes([model.ir_version])).hexdigest()[:16]


def write_graphs() -> None:
    """Export and quantise a seeded classifier of 4 heads, from photographs."""
    import photographs

    from tests.builders.checkpoints import hugging_face

    if (GRAPHS / "written").exists():
        return
    shutil.rmtree(GRAPHS, ignore_errors=True)
    pictures = GRAPHS / "photographs"
    pictures.mkdir(parents=True)
    photographs.main(pictures)
    hugging_face(GRAPHS / "checkpoint", labels=5, hidden_size=128, num_attention_heads=4)
    for target, dtype in rows():
        for input_format in (InputFormat.FLOAT, InputFormat.UINT8):
            one = Trial(target, dtype, input_format)
            if not dtype.is_quantised:
                everything = input_format is InputFormat.UINT8
                run_onnx(OnnxJob(
                    str(GRAPHS / "checkpoint"), one.path, target=target, dtype=dtype,
                    input_format=input_format, images=pictures, normalize=everything,
                    heads=HEADS if everything else (Head.LOGITS,),
                ))  # fmt: skip
                continue
            source = replace(one, dtype=Dtype.FP32)
            # 8 bits beside half precision are for TensorRT, whatever the graph was exported for
            base = Dtype.FP16 if target is Target.TENSORRT else Dtype.FP32
            # its numbers are judged on real models: this one must only have everything quantised
            _, manifest = run_calibrate(CalibrateJob(
                source.path, dtype, pictures, one.path, gate_cosine=0.5, compile=False, base=base
            ))  # fmt: skip
            assert manifest.target == target
    (GRAPHS / "written").touch()


# TensorRT-RTX that asks for a GPU to build, onnxruntime-web that runs in a browser alone
_NOT_HERE = re.compile("Cuda Runtime|no available backend found")


class UntriedError(Exception):
    """A version cannot be tried here: it does not install, or asks for a GPU or a browser."""


class Trials:
    """What came of each graph in each version: None, or why it does not run."""

    def __init__(self, interpreters: Sequence[str]) -> None:
        self._interpreters = interpreters
        self._kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def __call__(self, client: Client, version: str, target: Target, dtype: Dtype) -> str | None:
        """Try a row's files in a version; give the first reason why one does not run."""
        both = (InputFormat.FLOAT, InputFormat.UINT8)
        formats = both if client is not Client.TRANSFORMERS_JS else both[:1]  # it takes no bytes
        for input_format in formats:
            reason = self._try(client, version, Trial(target, dtype, input_format))
            if reason is not None:
                return reason
        return None

    def _try(self, client: Client, version: str, one: Trial) -> str | None:
        key = f"{client} {version} {one.path.name} {one.content}"
        if key not in self._kept:
            self._kept[key] = self._run(client, version, one)
            KEPT.write_text(json.dumps(self._kept, indent=1))
            print(f"{key}: {self._kept[key] or 'runs'}", flush=True)
        reason: str | None = self._kept[key]
        return reason

    def _run(self, client: Client, version: str, one: Trial) -> str | None:
        row = CLIENTS[client]
        name = one.input_format.tensor
        try:
            environment = clients.installed(row, version, self._interpreters)
        except ClientError as error:
            raise UntriedError(version) from error
        try:
            graph = one.path if client is not Client.TRANSFORMERS_JS else folder_of(one)
            found = clients.run(row, environment, graph, name, one.images)
            if row.executes:
                require_close(found, one)
        except ClientError as error:
            if _NOT_HERE.search(str(error)):
                raise UntriedError(version) from error
            return str(error)
        return None


def folder_of(one: Trial) -> Path:
    """Lay out a model's folder as transformers.js reads it."""
    folder = GRAPHS / f"{one.path.stem}-folder"
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    shutil.copy(GRAPHS / "checkpoint/config.json", folder)
    shutil.copy(one.path, folder / "onnx/model.onnx")
    return folder


def require_close(found: dict[str, np.ndarray], one: Trial) -> None:
    """Require that a runtime computes what the fp32 graph of the target does here."""
    import onnxruntime

    reference = replace(one, target=Target.PORTABLE, dtype=Dtype.FP32)
    session = onnxruntime.InferenceSession(reference.path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = session.run(names, {one.input_format.tensor: one.images})
    for name, right in zip(names, expected, strict=True):
        if name not in found or found[name].shape != right.shape:
            raise ClientError(f"gives no output {name} {list(right.shape)}")
        error = np.linalg.norm(found[name] - right) / np.linalg.norm(right)
        if not error <= LIMITS[one.dtype]:
            raise ClientError(f"output {name} has a relative error of {error:.2g}")


def released(client: Client, interpreters: Sequence[str]) -> list[str]:
    """List the client's released versions in ascending order."""
    row = CLIENTS[client]
    if row.is_npm:
        command = ["npm", "view", row.package, "versions", "--json"]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    else:
        found = []
        for python in interpreters:
            command = [python, "-m", "pip", "index", "versions", row.package]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found += re.search(r"Available versions: (.*)", text)[1].split(", ")
    plain = {version for version in found if re.fullmatch(r"[0-9]+(\.[0-9]+)+", version)}
    return sorted(plain, key=numbers)


def judge(versions: Sequence[str], fails: Callable[[str], str | None]) -> Cell:
    """Find the least version from which on none fails.

    Args:
        versions: in ascending order.
        fails: gives the reason why a version does not run, or None.
    """
    try:
        return _judge(versions, fails)
    except UntriedError as error:
        print(f"{error} cannot be tried: {error.__cause__}", flush=True)
        return judge([version for version in versions if version != str(error)], fails)


# What stands around a reason: names of errors, paths, C++ functions, and what says the same each time
_AROUND = re.compile(
    r"^[\w.]*(?:Error|Exception|Fail|NotImplemented|InvalidGraph|InvalidArgument)\w*: "
    r"|\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:"
    r"|Can't create a session\. ERROR_CODE: \d+, ERROR_MESSAGE: "
    r"|.*MyelinCheckException: .*CHECK\(\S*\) failed\. |\(See https?://\S+ .*?\) "
    r"|Exception from \S+:\s+Check 'false' failed at \S+:\s+FrontEnd API failed with \w+: "
    r"|\S*/\S*?:\d+(?: in)? [^()]*\([^()]*\)+\s*"
    r"|ONNX Runtime only \*guarantees\* support .*? released onnx opset versions\. "
    r"|The operator schemas and or other functionality may change.*"
    r"|\S*/\S*"
)
LONGEST = 200


def reason(error: str) -> str:
    """Take the reason out of an error's text: without paths, in few words."""
    found = " ".join(_AROUND.sub("", error).split())
    return found if len(found) <= LONGEST else found[:LONGEST].rsplit(" ", 1)[0] + " …"


def _judge(versions: Sequence[str], fails: Callable[[str], str | None]) -> Cell:
    minors = [a for a, b in pairwise([*versions, ""]) if numbers(a)[:2] != numbers(b)[:2]]
    newest = versions[-1]
    at = len(minors)
    while at and fails(minors[at - 1]) is None:
        at -= 1
    if at == len(minors):
        return Cell(None, "run", newest=newest, fails=reason(fails(newest) or ""))
    first = versions.index(minors[at - 1]) + 1 if at else 0
    least = versions.index(minors[at])
    while least > first and fails(versions[least - 1]) is None:
        least -= 1
    if least == 0:
        return Cell(versions[0], "least tried", newest=newest)
    before = versions[least - 1]
    return Cell(versions[least], "run", before, reason(fails(before) or ""), newest)


# What no run here can tell: TensorRT's libraries are not on PyPI, and there is no GPU
PARSER = "github.com/onnx/onnx-tensorrt"
TENSORRT_8 = Cell(
    "8.6", "read",
    source=f"{PARSER} docs/operators.md, release/8.6-GA: opset 17; LayerNormalization is new in it",
)  # fmt: skip
TENSORRT_ATTENTION = Cell(
    "10.14", "read", source=f"{PARSER} docs/Changelog.md, 10.14 GA: the Attention operator"
)
TENSORRT_PACKED = Cell(
    "11.0", "read", source=f"{PARSER} docs/operators.md of 10.15: q, k and v must be 4-D",
)  # fmt: skip
UNFUSED = "Attention in fp32 has no fused kernel, and the parser allows no other"
TENSORRT_FP32 = Cell(
    None, "read", note=UNFUSED,
    source="docs.nvidia.com TensorRT, IAttention: not decomposable by default; TensorRT-RTX's run",
)  # fmt: skip
ATTENTION_ON_CUDA = (
    "1.25.0",
    "onnxruntime_gpu 1.24.4 and 1.25.0 on PyPI: core/providers/cuda/llm/attention.cc is in "
    "the second's CUDA provider alone; github.com/microsoft/onnxruntime pull request 27542",
)


def read(row: Mapping[Client, Cell], target: Target) -> dict[Client, Cell]:
    """Add what is read to a row whose other cells were run."""
    if target is Target.PORTABLE:
        return {**row, Client.TENSORRT: TENSORRT_8}
    since, source = ATTENTION_ON_CUDA
    on_cuda = replace(row[Client.ONNXRUNTIME], attention_on_cuda=since, source=source)
    builds = row[Client.TENSORRT_RTX].least is not None
    with_attention = TENSORRT_PACKED if target is Target.ONNXRUNTIME else TENSORRT_ATTENTION
    tensorrt = with_attention if builds else TENSORRT_FP32
    return {**row, Client.ONNXRUNTIME: on_cuda, Client.TENSORRT: tensorrt}


def run(interpreters: Sequence[str]) -> Table:
    """Try every client that can be run here, and add what is read of the others."""
    write_graphs()
    trials = Trials(interpreters)
    table: dict[Target, dict[Dtype, dict[Client, Cell]]] = {target: {} for target in Target}
    for client in Client:
        if client not in CLIENTS:
            continue
        versions = released(client, interpreters)
        for target, dtype in rows():
            fails = partial(trials, client, target=target, dtype=dtype)
            table[target].setdefault(dtype, {})[client] = judge(versions, fails)
    return {
        target: {dtype: read(row, target) for dtype, row in of.items()}
        for target, of in table.items()
    }


def write(table: Table) -> None:
    """Write the table, a line for each cell with its fields that are set."""
    targets = []
    for target, rows in table.items():
        written = []
        for dtype, row in rows.items():
            cells = [f'   "{client}": {_plain(row[client])}' for client in Client]
            written.append(f'  "{dtype}": {{\n' + ",\n".join(cells) + "\n  }")
        targets.append(f' "{target}": {{\n' + ",\n".join(written) + "\n }")
    FILE.resolve().write_text("{\n" + ",\n".join(targets) + "\n}\n", encoding="utf-8")


def _plain(cell: Cell) -> str:
    fields = {name: value for name, value in to_plain(cell).items() if value or name == "least"}
    return json.dumps(fields, ensure_ascii=False)


def least_table(table: Table) -> str:
    """Write a row for each target and dtype: the least version of each client."""
    lines = [
        f"| `--target` | dtype | {' | '.join(client.full_name for client in Client)} |",
        "|---|---|" + "---|" * len(Client),
    ]
    for target in Target:
        for dtype, row in table[target].items():
            cells = [row[client].least or "none" for client in Client]
            lines.append(f"| {target} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evidence_table(table: Table) -> str:
    """Write a row for each client and least version, with what it rests on."""
    lines = ["| runtime | version | graphs | evidence |", "|---|---|---|---|"]
    for client in Client:
        graphs: dict[tuple[str, str], list[str]] = {}
        for target in Target:
            for dtype, row in table[target].items():
                cell = row[client]
                graphs.setdefault((str(cell), evidence(cell)), []).append(f"{target} {dtype}")
        for (least, why), names in graphs.items():
            lines.append(f"| {client.full_name} | {least} | {', '.join(names)} | {why} |")
    return "\n".join(lines)


def evidence(cell: Cell) -> str:
    """Say in words what a cell rests on."""
    parts = []
    if cell.evidence == "read":
        parts.append("read")
    elif cell.least is None:
        parts.append(f"run: not even {cell.newest} takes it (`{cell.fails}`)")
    elif cell.before is None:
        parts.append("least tried")
    else:
        parts.append(f"run; {cell.before} does not (`{cell.fails}`)")
    if cell.newest and cell.least:
        parts.append(f"Run up to {cell.newest}")
    if cell.attention_on_cuda:
        parts.append(f"On CUDA from {cell.attention_on_cuda} on")
    else:
        parts += filter(None, (cell.note, cell.source))
    return ". ".join(parts).replace("|", "\\|")


def write_pages(table: Table) -> None:
    """Write the tables into docs/clients.md."""
    replace_part(Path("docs/clients.md"), "versions", least_table(table))
    replace_part(PAGE, "evidence", evidence_table(table))


def main() -> None:
    """Make the runs and write the table and the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", default=[], help="one more interpreter")
    parser.add_argument("--pages", action="store_true", help="write the pages alone")
    given = parser.parse_args()
    if not given.pages:
        write(run([sys.executable, *given.python]))
        version_table.table.cache_clear()
    write_pages(version_table.table())


if __name__ == "__main__":
    main()
