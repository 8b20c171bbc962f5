"""Configurations that are wrong: what was changed, who notices, and what the linter says.

``by`` says what tritonserver itself does with the model: ``core`` refuses it, ``backend`` refuses
it in our stand-in by the rule of the C++ backend's source, ``nobody``: it is served, wrongly.
``dies``: with it in the repository the server itself died in three of four starts.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msn_export.commands.triton import TritonJob, run_triton
from msn_export.progress import Silent
from msn_export.spec import BatchRange, Dtype
from tests.builders.triton_artifacts import graph, plan

Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """One wrong model; ``base`` is a key of ``BASES``, ``edit`` changes its folder."""

    name: str
    base: str
    edit: Edit
    by: Literal["core", "backend", "nobody", "dies"]
    says: str


def swap(old: str, new: str, place: str = "config.pbtxt") -> Edit:
    """Replace text that must be there, once."""

    def edit(folder: Path) -> None:
        path = folder / place
        text = path.read_text()
        assert text.count(old) >= 1, f"{old!r} is not in {text}"
        path.write_text(text.replace(old, new, 1))

    return edit


def add(text: str) -> Edit:
    """Append to the configuration."""

    def edit(folder: Path) -> None:
        path = folder / "config.pbtxt"
        path.write_text(path.read_text() + text + "\n")

    return edit


def put(place: str, content: bytes) -> Edit:
    """Write a file."""

    def edit(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)

    return edit


def remove(place: str) -> Edit:
    """Delete a file or folder."""

    def edit(folder: Path) -> None:
        path = folder / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def both(*edits: Edit) -> Edit:
    """Do one after the other."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def without_section(kind: str) -> Edit:
    """Cut every input { } or output { } out."""

    def edit(folder: Path) -> None:
        path = folder / "config.pbtxt"
        kept, inside = [], False
        for line in path.read_text().splitlines():
            inside = inside or line == f"{kind} {{"
            if not inside:
                kept.append(line)
            inside = inside and line != "}"
        path.write_text("\n".join(kept) + "\n")

    return edit


IMAGE_DIMS = "  dims: 3\n  dims: 8\n  dims: 8\n"
LOGITS = '  name: "logits"\n  data_type: TYPE_FP32\n  dims: 3\n'
WIDE_PROFILES = '  profile: "0"\n  profile: "1"\n'

FAULTS = (
    Fault("no input section", "graph", without_section("input"), "backend",
          "input: section missing; 1/model.onnx has pixel_values"),
    Fault("no output section", "graph", without_section("output"), "nobody",
          "output: section missing; 1/model.onnx has logits, embedding"),
    Fault("input of another name", "graph", swap('"pixel_values"', '"pixels"'), "backend",
          "input 'pixels': 1/model.onnx has no such input; it has pixel_values"),
    Fault("output left out", "graph",
          swap('output {\n  name: "embedding"\n  data_type: TYPE_FP32\n  dims: 3\n}\n', ""),
          "nobody", "output: 'embedding' of 1/model.onnx is missing: no client can ask for it"),
    Fault("input of another dtype", "graph", swap("TYPE_FP32", "TYPE_FP16"), "backend",
          "TYPE_FP16; the artifact's is TYPE_FP32"),
    Fault("input of another shape", "graph",
          swap(IMAGE_DIMS, "  dims: 3\n  dims: 16\n  dims: 16\n"), "backend",
          "dims: [3, 16, 16]; the artifact's are [3, 8, 8]"),
    Fault("batch written into dims", "graph", swap(IMAGE_DIMS, "  dims: 1\n" + IMAGE_DIMS),
          "backend", "dims: [1, 3, 8, 8]; the artifact's are [3, 8, 8]"),
    Fault("dims of any size", "graph", swap(IMAGE_DIMS, "  dims: 3\n  dims: -1\n  dims: -1\n"),
          "backend", "dims: [3, -1, -1]; the artifact's are [3, 8, 8]"),
    Fault("batching a graph of a fixed batch", "static",
          swap("platform:", "max_batch_size: 8\nplatform:"), "backend",
          "max_batch_size: 8, and 1/model.onnx takes a batch of 2 alone"),
    Fault("no batching of a dynamic graph", "graph",
          both(swap("max_batch_size: 16", "max_batch_size: 0"),
               swap(IMAGE_DIMS, "  dims: -1\n" + IMAGE_DIMS),
               swap(LOGITS, LOGITS.replace("  dims: 3", "  dims: -1\n  dims: 3")),
               swap(LOGITS.replace("logits", "embedding"),
                    LOGITS.replace("logits", "embedding").replace("  dims", "  dims: -1\n  dims"))),
          "nobody", "max_batch_size: 0, and 1/model.onnx has a dynamic batch"),
    Fault("batches without dynamic_batching", "graph",
          swap("dynamic_batching {\n  max_queue_delay_microseconds: 500\n}\n", ""), "nobody",
          "dynamic_batching: missing: with max_batch_size 16 requests are still run one by one"),
    Fault("a preferred batch above the largest", "graph",
          swap("dynamic_batching {", "dynamic_batching {\n  preferred_batch_size: 64"), "core",
          "dynamic_batching.preferred_batch_size: 64 is not in 1 to 16"),
    Fault("a queue delay in milliseconds' place", "graph",
          swap("max_queue_delay_microseconds: 500", "max_queue_delay_microseconds: 5000000"),
          "nobody", "a lone request waits 5 s for others"),
    Fault("labels too few", "graph", put("labels.txt", b"cat\ndog\n"), "nobody",
          "labels.txt has 2 lines and the output 3 classes"),
    Fault("labels in another order", "graph", put("labels.txt", b"dog\ncat\na bird\n"), "nobody",
          "labels.txt is not what the manifest of 1/model.onnx calls its classes"),
    Fault("labels missing", "graph", remove("labels.txt"), "core",
          "label_filename: labels.txt does not exist"),
    Fault("labels outside the model", "graph",
          both(put("../labels.txt", b"cat\ndog\na bird\n"),
               swap('"labels.txt"', '"../labels.txt"')), "nobody",
          "label_filename: '../labels.txt' is not the name of a file in"),
    Fault("labels with Windows line ends", "graph", put("labels.txt", b"cat\r\ndog\r\na bird\r\n"),
          "nobody", "labels.txt has Windows line ends"),
    Fault("another model's name", "graph", swap('name: "', 'name: "other-'), "core",
          "Triton wants them the same"),
    Fault("a sequence model", "graph", both(
          swap("dynamic_batching {\n  max_queue_delay_microseconds: 500\n}\n", ""),
          add("sequence_batching { }")), "nobody", "sequence_batching: the model has no state"),
    Fault("CUDA graphs for a graph", "graph", add("optimization { cuda { graphs: true } }"),
          "nobody", "optimization.cuda: CUDA graphs are the TensorRT backend's"),
    Fault("onnxruntime's TensorRT in fp16", "graph",
          add('optimization { execution_accelerators { gpu_execution_accelerator { '
              'name: "tensorrt" parameters { key: "precision_mode" value: "FP16" } } } }'),
          "nobody", "precision_mode FP16 lowers the precision of a graph that was proved"),
    Fault("a profile for a graph", "graph", swap("  count: 1\n", '  count: 1\n  profile: "0"\n'),
          "core", "only engines have profiles"),
    Fault("engines by GPU for a graph", "graph",
          add('cc_model_filenames { key: "8.9" value: "model.onnx" }'), "nobody",
          "cc_model_filenames: only engines differ by GPU"),
    Fault("a graph that was changed", "graph", lambda folder: graph(
          folder / "1/model.onnx", manifest=False, scale=2.0) and None, "nobody",
          "is not the file its manifest describes"),
    Fault("a graph that is none", "graph", both(
          put("1/model.onnx", b"\0" * 100), remove("1/model.onnx.json")), "backend",
          "is not an ONNX file"),
    Fault("no file in the version", "graph", remove("1/model.onnx"), "backend",
          "1/: model.onnx does not exist"),
    Fault("a version with a zero before it", "graph", lambda folder: (
          folder / "1").rename(folder / "01") and None, "core",
          "versions: no version's folder; expected 1/"),
    Fault("a version that is not there", "graph",
          swap("  latest {\n    num_versions: 1\n  }", "  specific {\n    versions: [1, 7]\n  }"),
          "nobody", "version_policy.specific: version 7 is not there"),
    Fault("warm-up data too short", "warm", put("warmup/input.bin", b"\0" * 10), "core",
          "warmup/input.bin has 10 bytes; expected 768"),
    Fault("warm-up data of another size", "warm", put("warmup/input.bin", b"\0" * 1000), "nobody",
          "warmup/input.bin has 1000 bytes; expected 768"),
    Fault("warm-up data missing", "warm", remove("warmup/input.bin"), "core",
          "warmup/: input.bin does not exist"),
    Fault("warm-up batch too large", "warm", swap("batch_size: 4", "batch_size: 64"), "dies",
          "batch_size: 64 is not in 1 to 16"),
    Fault("an onnxruntime too old for Attention", "attention", swap("26.07", "25.06"), "nobody",
          "it needs onnxruntime 1.23.0, and Triton 25.06 has 1.22.0; use a later release"),
    Fault("an onnxruntime too old for int8", "int8", swap("26.07", "26.01"), "nobody",
          "it needs onnxruntime 1.24.1, and Triton 26.01 has 1.23.2; use a later release"),
    Fault("an engine's profile out of range", "plan",
          swap("  count: 1\n", '  count: 1\n  profile: "1"\n'), "nobody",
          "'1' is out of range: 1/model.plan has 1 profiles"),
    Fault("an instance a profile", "profiles", swap(
          "instance_group {\n  count: 1\n" + WIDE_PROFILES + "}",
          'instance_group {\n  profile: "0"\n}\ninstance_group {\n  profile: "1"\n}'), "nobody",
          "these instances take no batch of 5, and Triton gives any request to any instance"),
    Fault("only the first of two profiles", "profiles", swap(WIDE_PROFILES, ""), "nobody",
          "these instances take no batch of 5"),
    Fault("batches above every profile", "plan", swap("max_batch_size: 16", "max_batch_size: 64"),
          "nobody", "max_batch_size: 64, and no profile of 1/model.plan takes a batch of 17"),
    Fault("an engine for a GPU that is missing", "two",
          swap('value: "model.sm89.plan"', 'value: "model.sm90.plan"'), "backend",
          "1/: model.sm90.plan does not exist"),
    Fault("an engine for another GPU", "two",
          swap('value: "model.sm89.plan"', 'value: "model.sm86.plan"'), "nobody",
          "1/model.sm86.plan was built for SM 8.6"),
    Fault("an engine outside the version", "two",
          swap('value: "model.sm89.plan"', 'value: "../../outside.plan"'), "backend",
          "'../../outside.plan' is not the name of a file in 1/"),
    Fault("a CUDA graph above the largest batch", "graphs",
          swap("      batch_size: 16", "      batch_size: 32", "configs/gpu.pbtxt"), "nobody",
          "configs/gpu.pbtxt: optimization.cuda.graph_spec[2].batch_size: 32 is not in 1 to"),
    Fault("an engine on the CPU", "plan", swap("  count: 1\n", "  count: 1\n  kind: KIND_CPU\n"),
          "nobody", "an engine runs on a GPU only"),
    Fault("an engine of another TensorRT", "plan", swap("25.10", "25.06"), "nobody",
          "built by TensorRT 10.13.3.9, and Triton 25.06 has 10.11.0.33; Triton 25.10 has that"),
    Fault("a release that is none", "plan", swap("25.10", "25.13"), "nobody",
          "Triton release '25.13' is no release"),
    Fault("an engine without its manifest's truth", "plan",
          put("1/model.plan", b"ftrt" + bytes(20) + bytes([10, 13, 3, 9]) + b"other"), "nobody",
          "is not the file its manifest describes"),
    Fault("no configuration", "graph", remove("config.pbtxt"), "core",
          "config.pbtxt does not exist; without one Triton makes its own up"),
    Fault("a configuration that is none", "graph", put("config.pbtxt", b"name: {"), "core",
          "is no model configuration"),
    Fault("an ensemble of a model that is not there", "ensemble",
          swap("-preprocess", "-nothing"), "core", "is not in the repository"),
    Fault("an ensemble with a larger batch", "ensemble",
          swap("max_batch_size: 16", "max_batch_size: 32"), "core",
          "max_batch_size: 32, and ensemble_scheduling.step[0]"),
    Fault("an ensemble that feeds the wrong tensor", "ensemble",
          swap('    input_map {\n      key: "pixel_values"\n      value: "pixel_values"',
               '    input_map {\n      key: "pixel_values"\n      value: "images"'), "core",
          "'pixel_values' of"),
)  # fmt: skip

# what each base is written from; the model that is changed is the last of its names
TWO_PROFILES = (BatchRange(1, 2, 4), BatchRange(5, 8, 16))


def write_base(base: str, name: str, repository: Path, work: Path) -> Path:
    """Write a right model of a kind into a repository; give the folder that a fault changes."""
    work.mkdir(parents=True, exist_ok=True)
    options: dict[str, object] = {}
    match base:
        case "static":
            artifacts = [graph(work / "a.onnx", batch=2)]
        case "attention":
            artifacts = [graph(work / "a.onnx", opset=23)]
        case "int8":
            artifacts = [graph(work / "a.onnx", opset=23, dtype=Dtype.INT8)]
        case "plan":
            artifacts = [plan(work / "a.engine")]
        case "profiles":
            artifacts = [plan(work / "a.engine", profiles=TWO_PROFILES)]
        case "graphs":
            artifacts, options = [plan(work / "a.engine")], {"cuda_graphs": True}
        case "two":
            artifacts = [
                plan(work / f"{sm}.engine", capability=capability)
                for sm, capability in (("89", "8.9"), ("86", "8.6"))
            ]
        case _:
            artifacts = [graph(work / "a.onnx")]
            options = {"warm": {"warmup": True}, "ensemble": {"ensemble": True}}.get(base, {})
    job = TritonJob(tuple(artifacts), repository, name=name, **options)  # type: ignore[arg-type]
    run_triton(job, Silent())
    return repository / (f"{name}-images" if base == "ensemble" else name)
