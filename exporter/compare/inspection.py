"""The contents of an artifact, read without a GPU and without the TensorRT that built it."""

import itertools
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.artifact import Artifact
from msn_export.engine.census import Census, summary
from msn_export.engine.kernels import read_accumulators
from msn_export.engine_header import read_header
from msn_export.errors import GraphError, RunnerError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.precision import graph_dtype
from msn_export.graph.summary import macs
from msn_export.manifest import Manifest, manifest_path
from msn_export.preprocessing import Preprocessing
from msn_export.runtime import open_runner
from msn_export.runtime.runner import Precision
from msn_export.schema import Result, from_plain
from msn_export.spec import BatchRange, TensorSpec
from msn_export.version_table import Row, in_words, least_versions


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Result):
    """The facts of one artifact; None where the file does not tell. Sizes in bytes.

    ``compiled`` says what a graph computes in where it was compiled, by the runtime's name.
    ``least_versions`` says of other runtimes the first version that takes a graph, as the version
    table has it now; None: none does.

    ``described`` says whether a manifest vouches for the rest: only one whose hash is that of the
    file is believed; ``distrusted`` says why one is not. ``gemm_dtypes`` counts matrix products by
    what they multiply in, ``convolution_dtypes`` convolutions, ``accumulators`` fused attention
    kernels by what they sum in.
    """

    file: str
    kind: str
    bytes: int
    sha256: str
    described: str
    runs_on: str
    least_versions: dict[str, str | None] = field(default_factory=dict)
    made_by: str | None = None
    checkpoint: str | None = None
    command: str | None = None
    precision: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: Preprocessing | None = None
    profiles: tuple[BatchRange, ...] = ()
    nodes: int | None = None
    ops: dict[str, int] = field(default_factory=dict)
    multiply_adds: int | None = None
    attention_expected: int | None = None
    attention_fused: int | None = None
    gemm_dtypes: dict[str, int] = field(default_factory=dict)
    convolution_dtypes: dict[str, int] = field(default_factory=dict)
    accumulators: dict[str, int] = field(default_factory=dict)
    kernels: int | None = None
    kernels_per_block: dict[str, int] = field(default_factory=dict)
    kernel_kinds: dict[str, int] = field(default_factory=dict)
    layout_only: tuple[str, ...] = ()
    weight_bytes: int | None = None
    islands: tuple[str, ...] = ()
    fitted: str | None = None
    labels: tuple[str, ...] = ()
    check: str = "unknown"
    executed: str = "unknown"
    distrusted: str | None = None
    compiled: dict[str, Precision] = field(default_factory=dict)

    @property
    def other_bytes(self) -> int | None:
        """All that is not weights: code, names, padding."""
        return None if self.weight_bytes is None else max(0, self.bytes - self.weight_bytes)


def inspect(path: Path, providers: Sequence[str] = ()) -> Inspection:
    """Read an engine, an ONNX file, or a manifest.

    Args:
        path: the file.
        providers: of a graph: compile it there, and read back what it computes in.

    Raises:
        RunnerError: it cannot be compiled there.
        GraphError: there is no such file, or it is none of these.
        EngineFileError: an engine is damaged.
        ManifestError: a manifest that is given by itself is malformed.
    """
    if not path.is_file():
        raise GraphError(f"{path} does not exist; give an .onnx, .engine or .json file")
    if path.suffix == ".json":
        artifact = path.with_suffix("")
        return inspect(artifact) if artifact.is_file() else _of_manifest(path)
    found = inspect_artifact(Artifact.examine(path))
    if not providers:
        return found
    with open_runner(path, providers=providers) as runner:
        if runner.precision is None:
            raise RunnerError(f"{runner.name} does not say what it computes in; OpenVINO does")
        return replace(found, compiled={runner.name: runner.precision})


def inspect_artifact(artifact: Artifact) -> Inspection:
    """Take the facts of a file that is open."""
    name = manifest_path(artifact.path).name
    described = f"{name}, hash verified"
    if artifact.manifest is None:
        described = "no manifest: only what the file itself tells"
        described += ", unsealed" if artifact.metadata is not None else ""
    if artifact.distrusted is not None:
        described = f"{name} is not believed: only what the file itself tells"
    facts = _from_manifest(artifact.manifest) if artifact.manifest is not None else {}
    if artifact.metadata is not None:
        facts["preprocessing"] = artifact.metadata.preprocessing
    if artifact.kind == "onnx":
        row = artifact.stated.row if artifact.stated is not None else None
        runs_on = _runs_on_graph(artifact.summary.opset, row)
        facts["least_versions"] = least_versions(row) if row is not None else {}
        facts = _of_graph(artifact, facts)
    else:
        header = read_header(artifact.path)
        runs_on = f"{header.backend} {header.version} on {header.targets}"
        if artifact.manifest is None:
            facts["accumulators"] = _accumulators(artifact.path)
        facts["weight_bytes"] = header.weight_bytes
    return Inspection(
        artifact.path.name, artifact.kind, artifact.path.stat().st_size, artifact.sha256,
        described, runs_on, distrusted=artifact.distrusted, **facts,
    )  # fmt: skip


def _of_manifest(path: Path) -> Inspection:
    artifact = path.with_suffix("")
    manifest = manifests.read_unverified(path)
    described = "the manifest alone: its artifact is not beside it"
    row = manifest.row
    runs_on = _runs_on_engine(manifest) if manifest.engine else _runs_on_graph(manifest.opset, row)
    facts = _from_manifest(manifest)
    facts["least_versions"] = least_versions(row) if row is not None else {}
    return Inspection(
        artifact.name, manifest.kind, manifest.bytes, manifest.sha256, described, runs_on, **facts
    )


def _of_graph(artifact: Artifact, stated: dict[str, Any]) -> dict[str, Any]:
    """Take what a graph tells; what its manifest says of the rest stays."""
    written, model = artifact.summary, artifact.graph
    assert model is not None  # it is an ONNX file
    fused = sum(count for op, count in written.ops.items() if op.split(".")[-1] == "Attention")
    candidates = [node for node in model.graph if node.op_type in {"Attention", "Softmax"}]
    cores = [core for core in map(match, candidates) if isinstance(core, AttentionCore)]
    return {
        "attention_expected": max(len(cores), fused),
        **stated,
        "inputs": written.inputs,
        "outputs": written.outputs,
        "nodes": written.nodes,
        "ops": written.ops,
        "attention_fused": fused,
        "weight_bytes": artifact.weight_bytes,
        "precision": str(graph_dtype(model)),
        "multiply_adds": macs(model),
        "gemm_dtypes": _product_dtypes(model, {"MatMul", "Gemm"}),
        "convolution_dtypes": _product_dtypes(model, {"Conv"}),
    }


def _product_dtypes(model: ir.Model, operators: set[str]) -> dict[str, int]:
    """Count products by what they multiply in; a dequantised operand counts as quantised."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type not in operators or node.inputs[1] is None:
            continue
        value = node.inputs[1]
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            value = producer.inputs[0] or value
        counts[value.dtype.name.lower() if value.dtype else "unknown"] += 1
    return dict(counts.most_common())


def _accumulators(path: Path) -> dict[str, int]:
    """Count what fused attention sums in, from the source in the engine; nothing where none is."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as engine:
        found = read_accumulators(engine)
    return dict(Counter(itertools.chain(*found.values())).most_common())


def _from_manifest(manifest: Manifest) -> dict[str, Any]:
    check = manifest.check
    facts: dict[str, Any] = {
        "made_by": f"{manifest.product} ({_versions(manifest)})",
        "checkpoint": manifest.checkpoint.source if manifest.checkpoint else None,
        "command": manifest.command or None,
        "precision": str(manifest.dtype),
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "preprocessing": manifest.preprocessing,
        "profiles": manifest.profiles,
        "nodes": manifest.nodes,
        "ops": manifest.ops,
        "attention_expected": manifest.attention.expected,
        "attention_fused": manifest.attention.fused,
        "islands": tuple(sorted(manifest.islands)),
        "labels": manifest.labels,
        "fitted": manifest.fit.sentence if manifest.fit is not None else None,
        "check": "none" if check is None else _verdict(manifest),
        "executed": "on the CPU, in its check" if check is not None else "never",
    }
    if manifest.engine is not None:
        facts |= _census_facts(manifest)
    return facts


def _census_facts(manifest: Manifest) -> dict[str, Any]:
    engine = manifest.engine
    assert engine is not None
    facts: dict[str, Any] = {
        "kernels": engine.kernels,
        "kernels_per_block": engine.kernels_per_block,
        "gemm_dtypes": engine.gemm_dtypes,
        "accumulators": engine.accumulators,
        "attention_fused": engine.fused_attention,
        "precision": engine.precision,
        "executed": "yes" if engine.executed else engine.reason,
    }
    if isinstance(engine.census, list) and engine.census:
        census = from_plain(Census, engine.census[0], "census")
        figures = summary(census)
        facts["kernel_kinds"] = figures["kinds"]
        facts["convolution_dtypes"] = figures["convolution_dtypes"]
        facts["layout_only"] = tuple(
            f"{_where(kernel.block)}: {' '.join(kernel.layers) or kernel.name}"
            for kernel in census.layout_only
        )
    return facts


def _where(block: int | None) -> str:
    return "outside the blocks" if block is None else f"block {block}"


def _verdict(manifest: Manifest) -> str:
    check = manifest.check
    assert check is not None
    word = "passed" if check.passed else "failed"
    return (
        f"{word}: {check.images} of {check.source}, max_abs {_short(check.max_abs)}, "
        f"p1 cosine {_short(check.cosine_p1)}, on {check.executed_on}"
    )


def _short(number: float | None) -> str:
    return "none" if number is None else f"{number:.6g}"


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{n} {v}" for n, v in manifest.versions.items() if n != "msn-export")


def _runs_on_graph(opset: int, row: Row | None) -> str:
    if row is not None:
        return in_words(row)
    return f"any onnxruntime and TensorRT whose parser knows opset {opset}"


def _runs_on_engine(manifest: Manifest) -> str:
    engine = manifest.engine
    assert engine is not None
    return f"{engine.backend} {engine.version} on {engine.targets}"
