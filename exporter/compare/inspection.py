"""What an artifact is made of, read without a GPU and without the TensorRT that built it."""

import itertools
import mmap
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.engine.census import Census, summary
from msn_export.engine.kernels import read_accumulators
from msn_export.engine_header import EngineHeader, read_header
from msn_export.errors import GraphError, ManifestError
from msn_export.graph import io
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.opset import raised_where_possible, understand
from msn_export.graph.precision import graph_dtype
from msn_export.graph.summary import macs, operators, tensor_specs
from msn_export.manifest import Manifest, manifest_path, sha256_of
from msn_export.preprocessing import Preprocessing
from msn_export.schema import Result, from_plain
from msn_export.spec import BatchRange, TensorSpec


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Result):
    """The facts of one artifact; None where the file does not tell. Sizes in bytes.

    ``described`` says whether a manifest vouches for the rest: only one whose hash is that of the
    file is believed; ``distrusted`` says why one is not. ``gemm_dtypes`` counts matrix products by
    what they multiply in, ``accumulators`` fused attention kernels by what they sum in.
    """

    file: str
    kind: str
    bytes: int
    sha256: str
    described: str
    runs_on: str
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
    accumulators: dict[str, int] = field(default_factory=dict)
    kernels: int | None = None
    kernels_per_block: dict[str, int] = field(default_factory=dict)
    kernel_kinds: dict[str, int] = field(default_factory=dict)
    layout_only: tuple[str, ...] = ()
    weight_bytes: int | None = None
    islands: tuple[str, ...] = ()
    check: str = "unknown"
    executed: str = "unknown"
    distrusted: str | None = None

    @property
    def other_bytes(self) -> int | None:
        """What is not weights: code, names, padding."""
        return None if self.weight_bytes is None else max(0, self.bytes - self.weight_bytes)


def inspect(path: Path) -> Inspection:
    """Read an engine, an ONNX file, or a manifest.

    Raises:
        GraphError: there is no such file, or it is none of these.
        EngineFileError: an engine is damaged.
        ManifestError: a manifest that is given by itself is malformed.
    """
    if not path.is_file():
        raise GraphError(f"{path} does not exist; give an .onnx, .engine or .json file")
    if path.suffix == ".json":
        artifact = path.with_suffix("")
        return inspect(artifact) if artifact.is_file() else _of_manifest(path)
    manifest, distrusted = believed(path)
    name = manifest_path(path).name
    described = f"{name}, hash verified"
    if manifest is None:
        described = "no manifest: only what the file itself tells"
    if distrusted is not None:
        described = f"{name} is not believed: only what the file itself tells"
    if path.suffix == ".onnx":
        found = _of_graph(path, manifest, described)
    else:
        found = _of_engine(path, read_header(path), manifest, described)
    return replace(found, distrusted=distrusted)


def believed(path: Path) -> tuple[Manifest | None, str | None]:
    """Find the manifest that vouches for a file, or the reason why the one there does not."""
    try:
        return manifests.read(path), None
    except ManifestError as error:
        return None, str(error)


def _of_manifest(path: Path) -> Inspection:
    artifact = path.with_suffix("")
    manifest = manifests.read_unverified(path)
    described = "the manifest alone: its artifact is not beside it"
    runs_on = _runs_on_engine(manifest) if manifest.engine else _runs_on_graph(manifest.opset)
    facts = _from_manifest(manifest)
    return Inspection(
        artifact.name, manifest.kind, manifest.bytes, manifest.sha256, described, runs_on, **facts
    )


def _of_graph(path: Path, manifest: Manifest | None, described: str) -> Inspection:
    model = io.load(path)
    facts = _from_manifest(manifest) if manifest is not None else {}
    weights = model.graph.initializers.values()
    fused = [node for node in model.graph if node.op_type == "Attention"]
    opset = model.graph.opset_imports.get("", 0)
    facts |= {
        "inputs": tensor_specs(list(model.graph.inputs)),
        "outputs": tensor_specs(list(model.graph.outputs)),
        "nodes": len(model.graph),
        "ops": operators(model),
        "attention_fused": len(fused),
        "weight_bytes": sum(w.const_value.nbytes for w in weights if w.const_value is not None),
    }
    if manifest is None:  # from here on with what its shapes, and older forms, mean
        understand(model)
        model = raised_where_possible(model)
    else:
        io.infer_shapes(model)
    candidates = [node for node in model.graph if node.op_type in {"Attention", "Softmax"}]
    cores = [core for core in map(match, candidates) if isinstance(core, AttentionCore)]
    facts |= {
        "precision": str(graph_dtype(model)),
        "multiply_adds": macs(model),
        "gemm_dtypes": _product_dtypes(model),
    }
    facts.setdefault("attention_expected", max(len(cores), len(fused)))
    return Inspection(
        path.name, "onnx", path.stat().st_size, sha256_of(path), described,
        _runs_on_graph(opset), **facts,
    )  # fmt: skip


def _product_dtypes(model: ir.Model) -> dict[str, int]:
    """Count matrix products by what they multiply in; a dequantised operand counts as quantised."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        if node.op_type not in {"MatMul", "Gemm"} or node.inputs[1] is None:
            continue
        value = node.inputs[1]
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            value = producer.inputs[0] or value
        counts[value.dtype.name.lower() if value.dtype else "unknown"] += 1
    return dict(counts.most_common())


def _of_engine(
    path: Path, header: EngineHeader, manifest: Manifest | None, described: str
) -> Inspection:
    facts = _from_manifest(manifest) if manifest is not None else {}
    if manifest is None:
        facts["accumulators"] = _accumulators(path)
    facts["weight_bytes"] = header.weight_bytes
    return Inspection(
        path.name, "engine", path.stat().st_size, sha256_of(path), described,
        _runs_on_header(header), **facts,
    )  # fmt: skip


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


def _runs_on_graph(opset: int) -> str:
    return f"any onnxruntime and TensorRT whose parser knows opset {opset}"


def _runs_on_engine(manifest: Manifest) -> str:
    engine = manifest.engine
    assert engine is not None
    return f"{engine.backend} {engine.version} on {engine.targets}"


def _runs_on_header(header: EngineHeader) -> str:
    return f"{header.backend} {header.version} on {header.targets}"
