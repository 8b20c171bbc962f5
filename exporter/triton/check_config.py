"""What a configuration says about itself, before any file is opened."""

from collections.abc import Sequence

from msn_export.triton import messages
from msn_export.triton.artifact import Platform
from msn_export.triton.findings import Finding, Findings, Subject

LONGEST_DELAY = 1_000_000  # microseconds; a request that waits longer for company looks hung


def check_config(subject: Subject) -> Findings:
    """Check names, batching, instances and what a model without a state must not have."""
    yield from _check_names(subject)
    yield from _check_batching(subject)
    yield from _check_instances(subject)
    yield from _check_cuda_graphs(subject)
    yield from _check_accelerators(subject)
    config = subject.config
    if config.HasField("sequence_batching"):
        yield subject.wrong(
            "sequence_batching", "the model has no state; leave it out and use dynamic_batching"
        )
    if config.model_transaction_policy.decoupled:
        yield subject.wrong("model_transaction_policy", "a request has one answer; leave it out")
    if config.response_cache.enable:
        yield subject.note(
            "response_cache", "does nothing unless the server has --cache-config local,size=BYTES"
        )


def _check_names(subject: Subject) -> Findings:
    config, platform = subject.config, subject.platform
    if config.name and config.name != subject.folder.name:
        yield subject.wrong(
            "name", f"{config.name!r} in folder {subject.folder.name}; Triton wants them the same"
        )
    if platform is None or config.platform == "ensemble":
        return
    if config.backend and config.backend != platform.backend:
        yield subject.wrong(
            "backend", f"{config.backend!r} does not serve {platform}; expected {platform.backend}"
        )


def _check_batching(subject: Subject) -> Findings:
    config = subject.config
    batching, limit = config.dynamic_batching, config.max_batch_size
    if limit < 0:
        yield subject.wrong("max_batch_size", f"{limit} is below zero")
    if not config.HasField("dynamic_batching"):
        if limit > 1 and config.platform != "ensemble":
            yield subject.wrong(
                "dynamic_batching",
                f"missing: with max_batch_size {limit} requests are still run one by one; "
                "add dynamic_batching { }",
            )
        return
    if limit == 0:
        yield subject.wrong(
            "dynamic_batching", "does nothing with max_batch_size 0: no two requests are joined"
        )
    for size in batching.preferred_batch_size:
        if not 1 <= size <= max(limit, 1):
            yield subject.wrong(
                "dynamic_batching.preferred_batch_size", f"{size} is not in 1 to {limit}"
            )
    if batching.max_queue_delay_microseconds > LONGEST_DELAY:
        seconds = batching.max_queue_delay_microseconds / 1e6
        yield subject.wrong(
            "dynamic_batching.max_queue_delay_microseconds",
            f"a lone request waits {seconds:g} s for others; expected below 1 s",
        )


def _check_instances(subject: Subject) -> Findings:
    config = subject.config
    kinds = messages.module().ModelInstanceGroup
    for index, group in enumerate(config.instance_group):
        where = f"instance_group[{index}]"
        if subject.platform is Platform.PLAN and group.kind == kinds.KIND_CPU:
            yield subject.wrong(f"{where}.kind", "an engine runs on a GPU only; leave kind out")
        if subject.platform is Platform.ONNX and group.profile:
            yield subject.wrong(
                f"{where}.profile", "only engines have profiles: Triton refuses it here"
            )
        if group.kind == kinds.KIND_CPU and group.gpus:
            yield subject.wrong(f"{where}.gpus", "KIND_CPU has no GPUs")
        if group.count < 0:
            yield subject.wrong(f"{where}.count", f"{group.count} is below zero")


def _check_cuda_graphs(subject: Subject) -> Findings:
    config = subject.config
    cuda = config.optimization.cuda
    if not cuda.graphs and not cuda.graph_spec:
        return
    where, limit = "optimization.cuda.graph_spec", config.max_batch_size
    if subject.platform is not Platform.PLAN:
        yield subject.wrong(
            "optimization.cuda", "CUDA graphs are the TensorRT backend's; this one ignores them"
        )
    elif not cuda.graphs:
        yield subject.wrong(where, "does nothing without graphs: true")
    for index, spec in enumerate(cuda.graph_spec):
        sizes = [spec.batch_size]
        if spec.HasField("graph_lower_bound"):
            sizes.append(spec.graph_lower_bound.batch_size)
        if limit == 0 and any(sizes):
            yield subject.wrong(f"{where}[{index}].batch_size", "expected 0: max_batch_size is 0")
        if limit > 0 and not all(1 <= size <= limit for size in sizes):
            yield subject.wrong(
                f"{where}[{index}].batch_size",
                f"{', '.join(map(str, sizes))} is not in 1 to max_batch_size, {limit}",
            )


def _check_accelerators(subject: Subject) -> Findings:
    for accelerator in subject.config.optimization.execution_accelerators.gpu_execution_accelerator:
        precision = accelerator.parameters.get("precision_mode", "FP32").upper()
        if accelerator.name == "tensorrt" and precision != "FP32":
            yield subject.wrong(
                "optimization.execution_accelerators",
                f"precision_mode {precision} lowers the precision of a graph that was proved as "
                "it is typed; serve a graph typed by --dtype, or an engine",
            )


def duplicates(names: Sequence[str], where: str, subject: Subject) -> list[Finding]:
    """Report names that occur twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    return [subject.wrong(where, f"{name!r} is there twice") for name in twice]
