"""An ensemble against the models it is made of: names, dtypes, shapes, batches."""

from collections.abc import Mapping
from typing import Any

from msn_export.triton import messages
from msn_export.triton.findings import Findings, Subject
from msn_export.triton.messages import ModelConfig


def check_ensemble(subject: Subject, models: Mapping[str, ModelConfig]) -> Findings:
    """Check each step's model, and each tensor that goes from one step to the next.

    Args:
        subject: the ensemble.
        models: the repository's models by name, as their ``config.pbtxt`` describes them.
    """
    config = subject.config
    if config.instance_group or config.HasField("optimization") or config.model_warmup:
        yield subject.wrong(
            "ensemble", "instance_group, optimization and model_warmup belong to its steps' models"
        )
    steps = config.ensemble_scheduling.step
    if not steps:
        yield subject.wrong("ensemble_scheduling", "has no step")
        return
    tensors = {tensor.name: tensor for tensor in config.input}
    read: set[str] = set()
    for index, step in enumerate(steps):
        where = f"ensemble_scheduling.step[{index}]"
        model = models.get(step.model_name)
        if model is None:
            yield subject.wrong(where, f"model {step.model_name!r} is not in the repository")
            return
        yield from _check_step_batch(subject, model, where)
        yield from _check_inputs(subject, step, model, tensors, where)
        read |= set(step.input_map.values())
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, ours in step.output_map.items():
            if name not in outputs:
                yield subject.wrong(f"{where}.output_map", f"{step.model_name} gives no {name!r}")
            else:
                tensors[ours] = outputs[name]
    for tensor in config.input:
        if tensor.name not in read:
            yield subject.wrong(f"input {tensor.name!r}", "no step reads it")
    for tensor in config.output:
        made = tensors.get(tensor.name)
        if made is None:
            yield subject.wrong(f"output {tensor.name!r}", "no step makes it")
        elif _described(made) != _described(tensor):
            yield subject.wrong(
                f"output {tensor.name!r}",
                f"{_described(tensor)}; its step gives {_described(made)}",
            )


def _check_step_batch(subject: Subject, model: ModelConfig, where: str) -> Findings:
    limit = subject.config.max_batch_size
    if model.max_batch_size < limit or (model.max_batch_size > 0) != (limit > 0):
        yield subject.wrong(
            "max_batch_size", f"{limit}, and {where} ({model.name}) has {model.max_batch_size}"
        )


def _check_inputs(
    subject: Subject, step: Any, model: ModelConfig, tensors: Mapping[str, Any], where: str
) -> Findings:
    for tensor in model.input:
        ours = step.input_map.get(tensor.name)
        if ours is None:
            yield subject.wrong(f"{where}.input_map", f"{tensor.name!r} gets nothing")
        elif ours not in tensors:
            yield subject.wrong(f"{where}.input_map", f"nothing before it makes {ours!r}")
        elif _described(tensors[ours]) != _described(tensor):
            yield subject.wrong(
                f"{where}.input_map",
                f"{tensor.name!r} of {model.name} is {_described(tensor)}, and gets "
                f"{_described(tensors[ours])}",
            )
    for name in sorted(step.input_map.keys() - {tensor.name for tensor in model.input}):
        yield subject.wrong(f"{where}.input_map", f"{model.name} takes no {name!r}")


def _described(tensor: Any) -> str:
    return f"{messages.datatype_name(tensor.data_type)} {list(tensor.dims)}"
