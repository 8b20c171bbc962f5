"""Build an engine once more with its residual stream as outputs: how drift looks into one.

A TensorRT engine shows nothing but its outputs. Marking a tensor as one keeps it from being fused
away, so the engine that is looked into is not the very one in production: the same graph, types,
backend and profiles, but other kernels around the marked tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

from msn_export.commands.jobs import TrtJob
from msn_export.commands.trt import run_trt
from msn_export.engine_header import read_header
from msn_export.errors import ManifestError
from msn_export.manifest import Manifest, sha256_of
from msn_export.progress import Progress
from msn_export.schema import to_plain


def build_marked(engine: Path, manifest: Manifest, folder: Path, progress: Progress) -> Path:
    """Compile the graph an engine came from with the stages of its stream as outputs.

    The outputs are float32 and named ``seen:block 3``; those of the engine itself stay.
    """
    record, source = manifest.engine, manifest.source
    if record is None or source is None:
        raise ManifestError(f"the manifest of {engine} does not say which graph it came from")
    graph = engine.parent / source.file
    if not graph.is_file() or sha256_of(graph) != source.sha256:
        raise ManifestError(
            f"{engine} was built from {source.file} (sha256 {source.sha256[:12]}…), which is not "
            f"beside it; put it at {graph}, for drift builds it once more with its blocks shown"
        )
    header = read_header(engine)
    islands = folder / "islands.json"
    measured = {name: peak for name, peak in manifest.islands.items() if peak is not None}
    islands.write_text(json.dumps(to_plain(measured)), encoding="utf-8")
    job = TrtJob(
        graph,
        output=folder / f"marked-{engine.name}",
        precision=manifest.dtype,
        backend=record.backend,
        # those that were asked for: none where it claims later GPUs too, or was built by full TensorRT,
        # whose header names none and which takes none
        capabilities=() if header.later else header.capabilities,
        profiles=manifest.profiles,
        tf32=record.options.get("tf32") is True,
        hardware_compatible=record.options.get("hardware_compatible") is True,
        islands=str(islands) if measured else "none",
        bf16_attention=record.attention.bf16 if record.attention is not None else (),
        check=False,
        stages=True,
        force=True,
    )
    return run_trt(job, progress)[0]
