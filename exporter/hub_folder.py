"""A model's folder as model hubs have it: its files, its config.json, and the graph that runs.

transformers.js and optimum read ``config.json``, ``preprocessor_config.json`` and ``onnx/*.onnx``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msn_export import manifest as manifests
from msn_export.errors import RunnerError
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from msn_export.models.config import VitConfig

CONFIG, CARD = "config.json", "README.md"
# transformers.js src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING: q8 is _quantized
GRAPHS = {
    Dtype.FP32: "onnx/model.onnx",
    Dtype.FP16: "onnx/model_fp16.onnx",
    Dtype.INT8: "onnx/model_quantized.onnx",
}
# One model's graphs in any dtype, as transformers.js names them: model_q4.onnx, model_bnb4.onnx
_ONE_MODEL = re.compile(r"model(_[a-z0-9]+)?\.onnx")


def transformers_config(config: VitConfig) -> dict[str, Any]:
    """Write a model's shape as transformers writes it, labels and all.

    transformers models/vit_msn/configuration_vit_msn.py; what only training reads has the defaults
    that are there. A fitted classifier is one of ViTMSNForImageClassification to those who read it.
    """
    labels = config.labels
    sides = (config.image_size, config.patch_size)
    image, patch = (size[0] if size[0] == size[1] else list(size) for size in sides)
    written: dict[str, Any] = {
        "architectures": ["ViTMSNForImageClassification" if labels else "ViTMSNModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": config.activation,
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.dim,
        "image_size": image,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.eps,
        "model_type": "vit_msn",
        "num_attention_heads": config.heads,
        "num_channels": config.channels,
        "num_hidden_layers": config.depth,
        "patch_size": patch,
        "qkv_bias": config.qkv_bias,
    }
    if labels:
        written["id2label"] = {str(number): label for number, label in enumerate(labels)}
        written["label2id"] = {label: number for number, label in enumerate(labels)}
    if config.problem_type is not None:
        written["problem_type"] = config.problem_type
    return dict(sorted(written.items()))


def graph_in(folder: Path, dtype: Dtype | None, *, on_gpu: bool) -> Path:
    """Choose the graph of a folder that runs.

    Args:
        folder: as ``msn-export hub`` writes it.
        dtype: fp32, fp16 or int8; None chooses: fp16 on a GPU, int8 on a CPU, where they are there,
            else fp32.
        on_gpu: it is to run on a GPU.

    Raises:
        RunnerError: the folder has no such graph, or the graphs of two models.
        ManifestError: a graph of the folder is not what its manifest says.
    """
    graphs = {kind: folder / name for kind, name in GRAPHS.items() if (folder / name).is_file()}
    _require_one_model(folder, graphs)
    if dtype is not None and dtype not in GRAPHS:
        raise RunnerError(f"dtype is {dtype}; a folder's graphs are {', '.join(GRAPHS)}")
    if dtype is not None and dtype not in graphs:
        raise RunnerError(
            f"{folder} has no {dtype} graph, {GRAPHS[dtype]}; it has {', '.join(graphs)}: write it "
            "again with that dtype"
        )
    preferred = Dtype.FP16 if on_gpu else Dtype.INT8
    order = [dtype] if dtype is not None else [preferred, Dtype.FP32, *GRAPHS]
    return next(graphs[kind] for kind in order if kind in graphs)


def _require_one_model(folder: Path, graphs: dict[Dtype, Path]) -> None:
    """Require graphs of one model, by their names and, where they have one, by their manifests."""
    found = sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
    foreign = [path for path in found if not _ONE_MODEL.fullmatch(path.name)]
    if not graphs:
        raise RunnerError(
            f"{folder} has none of {', '.join(GRAPHS.values())}; give the .onnx file, or a folder "
            "that msn-export hub wrote"
        )
    outside = [path for path in found if path.parent == folder]
    other = next(iter([*foreign, *outside]), None)
    first = next(iter(graphs.values()))
    if other is None:
        models: dict[object, Path] = {}
        for path in graphs.values():
            models.setdefault(_identity(path), path)
        models.pop(None, None)  # of a graph without a manifest nothing is known to differ
        if len(models) > 1:
            first, other = list(models.values())[:2]
    if other is not None:
        names = [str(path.relative_to(folder)) for path in (first, other)]
        raise RunnerError(
            f"{folder} holds two models, {' and '.join(names)}; give the .onnx file that is meant"
        )


def _identity(graph: Path) -> object:
    """Give what is the same of one model's graphs; None where there is no manifest to say it."""
    manifest = manifests.read(graph)
    if manifest is None:
        return None
    weights = manifest.checkpoint.sha256 if manifest.checkpoint is not None else None
    fitted = manifest.fit.weights if manifest.fit is not None else None
    return weights, fitted, manifest.labels, tuple(spec.name for spec in manifest.outputs)
