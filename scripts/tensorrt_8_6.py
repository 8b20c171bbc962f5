"""Build and run an engine of TensorRT 8.6 with our own runner, on a card whose Python modules end at 3.10.

    python scripts/tensorrt_8_6.py export FOLDER        # Python 3.11 or later, torch: graph and expected rows
    python3.10 scripts/tensorrt_8_6.py run FOLDER       # the interpreter of the bundle tensorrt-8.6

``run`` compiles in its own process (the compiler's child needs Python 3.11) without the tactics of cuBLAS and
cuDNN, which the bundle lacks. It opens the engine with msn_export.runtime, compares with what PyTorch gave, and
times batches 1, 8 and 64. FOLDER/results.json is written after each step.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (1, 8, 64)
CALLS = 50
CLOSE = 0.999  # cosine; fp16 engines of other TensorRTs are held to their measured limits instead


def export(folder: Path) -> None:
    """Write the portable fp32 graph of vit-msn-small, pictures as its input, and the rows of PyTorch."""
    import photographs

    from msn_export import manifest
    from msn_export.commands.onnx import OnnxJob, run_onnx
    from msn_export.graph.torch_reference import TorchRunner
    from msn_export.metrics.evaluate import draw
    from msn_export.models.checkpoint import load_checkpoint
    from msn_export.spec import BatchRange, Head, InputFormat, Target

    folder.mkdir(parents=True, exist_ok=True)
    photographs.main(folder / "photographs")
    source, images = "random:vit-msn-small:0", folder / "photographs"
    run_onnx(
        OnnxJob(source, folder / "small.onnx", heads=(Head.CLS,), batch=BatchRange(1, 8, 64),
                target=Target.PORTABLE, images=images, force=True)
    )  # fmt: skip
    read = manifest.read(folder / "small.onnx")
    assert read is not None
    assert read.preprocessing is not None
    pixels = draw(images, read.preprocessing).preprocess(range(16), InputFormat.FLOAT)
    rows = TorchRunner(load_checkpoint(source).model, (Head.CLS,))(pixels)["embedding"]
    np.savez(folder / "expected.npz", pixels=pixels, rows=rows)


def build(graph: Path) -> bytes:
    """Compile the graph in fp16 for the card of this machine."""
    import tensorrt as trt

    from msn_export.engine import compile as compiler
    from msn_export.engine.options import BuildSpec
    from msn_export.errors import BuildError
    from msn_export.runtime.versions import row_for
    from msn_export.spec import BatchRange, Dtype

    row = row_for("tensorrt", trt.__version__)
    assert row is not None, trt.__version__
    said = compiler.BuilderLog()
    log = compiler.make_log(trt, said, sys.stdout)
    builder = trt.Builder(log)
    flags = sum(
        1 << int(getattr(trt.NetworkDefinitionCreationFlag, flag)) for flag in row.network_flags
    )
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"TensorRT does not read {graph}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.set_tactic_sources(
        1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS)
        | 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)
    )
    spec = BuildSpec(graph, (BatchRange(1, 8, 64),), precision=Dtype.FP16)
    compiler.add_profiles(builder, config, network, spec)
    compiler.set_types(trt, row, config, network, spec)
    compiler.set_options(trt, config, spec)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"TensorRT builds nothing: {compiler.explain_or_quote(said.errors)}")
    return bytes(plan)


def measure(folder: Path, found: dict[str, Any]) -> None:
    """Build, open, compare and time; what is found is written after each step."""
    from msn_export.host import NoDriver, find_driver
    from msn_export.runtime import open_runner

    def keep(**more: Any) -> None:
        found.update(more)
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")

    driver = find_driver()
    if isinstance(driver, NoDriver):
        keep(reason=driver.reason)
        raise SystemExit(f"nothing was run: {driver.reason}")
    keep(
        device=driver.devices[0].name,
        capability=str(driver.devices[0].capability),
        driver=driver.version,
    )
    engine = folder / "small.engine"
    started = time.monotonic()
    engine.write_bytes(build(folder / "small.onnx"))
    keep(build_seconds=time.monotonic() - started, bytes=engine.stat().st_size)
    expected = np.load(folder / "expected.npz", allow_pickle=False)
    pixels, rows = expected["pixels"], expected["rows"]
    with open_runner(engine, trust=True) as runner:
        got = runner(pixels)["embedding"].astype(np.float64)
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(rows, axis=1)
        cosines = (got * rows).sum(axis=1) / norms
        keep(cosine_min=float(cosines.min()), passed=bool(cosines.min() >= CLOSE))
        for batch in BATCHES:
            images = np.resize(pixels, (batch, *pixels.shape[1:]))
            times = []
            for _ in range(CALLS):
                began = time.perf_counter()
                runner(images)
                times.append((time.perf_counter() - began) * 1000)
            keep(
                **{f"batch_{batch}_ms": statistics.median(times)}
            )  # copies to the card and back too


def main(arguments: list[str]) -> None:
    """Export, or run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("step", choices=("export", "run"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args(arguments)
    if asked.step == "export":
        export(asked.folder)
        return
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    measure(asked.folder, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
