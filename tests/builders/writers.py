"""Files as training scripts and libraries write them, all of one seeded model of 2 blocks.

A state here has the names of facebookresearch/msn src/deit.py. The layouts of timm, torchvision,
lightly and peft are compared with what those libraries write in test_writers.py, where they are
installed; the rest follows the sources named at each.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

DIM, DEPTH, HEADS, MLP, LABELS = 64, 2, 2, 128, 3
CONFIG: dict[str, Any] = {
    "model_type": "vit_msn", "hidden_size": DIM, "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS, "intermediate_size": MLP, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Draw every number, gains about 1: a weight that is lost or swapped changes the output."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.15
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def encoder(seed: int = 0, *, norm: bool = True) -> State:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 17, DIM),
        "patch_embed.proj.weight": (DIM, 3, 8, 8),
        "patch_embed.proj.bias": (DIM,),
    }
    for i in range(DEPTH):
        for name, (rows, columns) in {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (MLP, DIM),
            "mlp.fc2": (DIM, MLP),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes |= layer_norm(f"blocks.{i}.{name}", DIM)
    return draw(shapes | (layer_norm("norm", DIM) if norm else {}), seed)


def layer_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (LABELS, width), f"{name}.bias": (LABELS,)}


def head() -> State:
    return draw(linear("head", DIM), 1)


def batch_norm() -> State:
    state = draw({"head.0.running_mean": (DIM,), "head.0.running_var": (DIM,)}, 4)
    return state | {"head.0.running_var": state["head.0.running_var"].square() + 0.5}


def linear_probe() -> State:
    """The head of facebookresearch/mae main_linprobe.py."""
    weights = {key.replace("head.", "head.1."): tensor for key, tensor in head().items()}
    return batch_norm() | weights | {"head.0.num_batches_tracked": torch.tensor(7)}


def fc_norm() -> State:
    return draw(layer_norm("fc_norm", DIM), 2)


def probe(blocks: int) -> State:
    """LinearClassifier of facebookresearch/msn linear_eval.py."""
    return draw(layer_norm("norm", blocks * DIM) | linear("linear", blocks * DIM), 3)


# --- what the writers compute, from their papers and sources, on the names above ------------------


def layers(state: State, images: Tensor) -> list[Tensor]:
    """Give the tokens [b, n, dim] after each block, before any final LayerNorm."""
    batch, size = images.shape[0], DIM // HEADS
    weight = state["patch_embed.proj.weight"].reshape(DIM, -1)
    patches = torch.nn.functional.unfold(images, 8, stride=8).mT  # [b, n - 1, 3 * 8 * 8]
    x = patches @ weight.T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].repeat(batch, 1, 1), x], 1) + state["pos_embed"]
    after = []
    for i in range(DEPTH):
        at = f"blocks.{i}."
        y = norm(state, f"{at}norm1", x)
        qkv = (y @ state[f"{at}attn.qkv.weight"].T + state[f"{at}attn.qkv.bias"]).split(DIM, -1)
        q, k, v = (part.reshape(batch, -1, HEADS, size) for part in qkv)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, -1, DIM)
        x = x + mixed @ state[f"{at}attn.proj.weight"].T + state[f"{at}attn.proj.bias"]
        y = norm(state, f"{at}norm2", x)
        y = y @ state[f"{at}mlp.fc1.weight"].T + state[f"{at}mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + y @ state[f"{at}mlp.fc2.weight"].T + state[f"{at}mlp.fc2.bias"]
        after.append(x)
    return after


def norm(state: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def of_cls(images: Tensor) -> Tensor:
    """MAE --cls_token, transformers, torchvision: [CLS] after the final LayerNorm."""
    state = encoder() | head()
    cls = norm(state, "norm", layers(state, images)[-1])[:, 0]
    return cls @ state["head.weight"].T + state["head.bias"]


def of_probe(images: Tensor) -> Tensor:
    """MAE main_linprobe.py: [CLS], a BatchNorm without weights, a linear layer."""
    state = encoder() | batch_norm() | head()
    cls = norm(state, "norm", layers(state, images)[-1])[:, 0]
    x = (cls - state["head.0.running_mean"]) / (state["head.0.running_var"] + 1e-6).sqrt()
    return x @ state["head.weight"].T + state["head.bias"]


def of_patches(images: Tensor) -> Tensor:
    """MAE --global_pool: the patches' mean, then its LayerNorm; the encoder has none."""
    state = encoder(norm=False) | fc_norm() | head()
    mean = layers(state, images)[-1][:, 1:].mean(1)
    return norm(state, "fc_norm", mean) @ state["head.weight"].T + state["head.bias"]


def of_blocks(images: Tensor, blocks: int) -> Tensor:
    """msn's linear_eval.py: [CLS] of the last blocks, LayerNorm of torch's eps, norm 1, linear."""
    state = probe(blocks)
    cls = torch.cat([x[:, 0] for x in layers(encoder(norm=False), images)[-blocks:]], 1)
    x = norm(state, "norm", cls, eps=1e-5)
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    return x @ state["linear.weight"].T + state["linear.bias"]


# --- names ----------------------------------------------------------------------------------------


def renamed(state: State, outside: dict[str, str], inside: dict[str, str], block: str) -> State:
    """Rename modules; a packed projection is split where ``inside`` has three names for it."""
    named: State = {}
    for key, tensor in state.items():
        stem, _, leaf = f".{key}".rpartition(".")
        stem = stem.removeprefix(".")
        if stem.startswith("blocks."):
            _, number, name = stem.split(".", 2)
            names = inside[name].split()
            for part, piece in zip(names, tensor.chunk(len(names)), strict=True):
                named[f"{block.format(number)}{part}.{leaf}"] = piece.clone()
        elif stem in outside:
            named[f"{outside[stem]}.{leaf}"] = tensor
        else:
            named[outside[key]] = tensor
    return named


_HF = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}


def transformers_4(state: State) -> State:
    """transformers 4.57.6."""
    attention = "attention.attention"
    inside = {
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.qkv": f"{attention}.query {attention}.key {attention}.value",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    return _below_vit(renamed(state, _HF, inside, "encoder.layer.{}."))


def transformers_5(state: State) -> State:
    """The modules of transformers 5.23."""
    inside = {
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.qkv": "attention.q_proj attention.k_proj attention.v_proj",
        "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    return _below_vit(renamed(state, _HF, inside, "layers.{}."))


def _below_vit(state: State) -> State:
    if "classifier.weight" not in state:
        return state
    return {k if k.startswith("classifier") else f"vit.{k}": t for k, t in state.items()}


def torchvision(state: State) -> State:
    """torchvision 0.29.1, VisionTransformer."""
    outside = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj", "norm": "encoder.ln", "head": "heads.head",
    }  # fmt: skip
    inside = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "self_attention.in_proj",
        "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3",
    }  # fmt: skip
    named = renamed(state, outside, inside, "encoder.layers.encoder_layer_{}.")
    return {key.replace("in_proj.", "in_proj_"): tensor for key, tensor in named.items()}


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def lightly(state: State) -> State:
    """lightly 1.6.0, docs/source/examples/msn.rst: the averaged encoder is ``backbone``."""
    other = {key: tensor + 1 for key, tensor in state.items()}
    inner = {"mask_token": torch.zeros(1, 1, DIM)}
    return {
        **prefixed("backbone.", inner | prefixed("vit.", state)),
        **prefixed("anchor_backbone.", inner | prefixed("vit.", other)),
        "projection_head.layers.0.weight": torch.zeros(8, DIM),
        "prototypes.weight": torch.zeros(4, 8),
    }


# --- files ----------------------------------------------------------------------------------------


def saved(saved: Any, folder: Path, name: str = "w.pth") -> Path:
    """Write with torch.save, and the config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(saved, folder / name)
    return folder / name


def hub_folder(state: State, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, folder / "model.safetensors")
    return folder


def mae(state: State) -> dict[str, Any]:
    """facebookresearch/mae util/misc.py, save_model."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 99,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vit_small_patch16", global_pool=True, lr=1e-3),
    }


def linear_eval(blocks: int, *, parallel: bool = False) -> dict[str, Any]:
    """facebookresearch/msn linear_eval.py; the classifier is wrapped on more than one GPU."""
    return {
        "target_encoder": encoder(norm=False),
        "classifier": prefixed("module." if parallel else "", probe(blocks)),
        "opt": {"state": {}, "param_groups": []},
        "epoch": 100,
        "world_size": 8,
        "best_top1_acc": torch.tensor(70.0),
        "batch_size": 256,
        "lr": 6.4,
    }


def pre_training() -> dict[str, Any]:
    """facebookresearch/msn src/msn_train.py, save_checkpoint, of DistributedDataParallel."""
    projection = {"fc.fc1.weight": torch.zeros(2, DIM)}
    return {
        "encoder": prefixed("module.", encoder(7) | projection),
        "opt": {"state": {}, "param_groups": []},
        "prototypes": torch.zeros(4, 2),
        "target_encoder": prefixed("module.", encoder() | projection),
        "epoch": 800,
        "loss": 1.0,
        "batch_size": 64,
        "world_size": 8,
        "lr": 0.001,
    }


def timm_training(state: State) -> dict[str, Any]:
    """timm 1.0.31, utils/checkpoint_saver.py."""
    other = {key: tensor * 1.05 for key, tensor in state.items()}
    return {
        "epoch": 1, "arch": "vit_small_patch16_224", "state_dict": state, "optimizer": {},
        "version": 2, "args": argparse.Namespace(model="vit"), "state_dict_ema": other,
        "metric": 0.5,
    }  # fmt: skip


def self_distillation() -> dict[str, Any]:
    """facebookresearch/dino main_dino.py: MultiCropWrapper of backbone and head."""
    rest = {"head.mlp.0.weight": torch.zeros(2, DIM), "head.last_layer.weight_v": torch.zeros(2)}
    return {
        "student": prefixed("module.", prefixed("backbone.", encoder(7)) | rest),
        "teacher": prefixed("backbone.", encoder()) | rest,
        "optimizer": {}, "epoch": 3, "args": argparse.Namespace(arch="vit"),
        "dino_loss": {"center": torch.zeros(1, 2)},
    }  # fmt: skip


Write = Callable[[Path], Path]

# what a user would give -> the notes' beginning; each holds encoder() as it is
ENCODERS: dict[str, tuple[Write, str]] = {
    "transformers 4.57": (lambda f: hub_folder(transformers_4(encoder()), f), ""),
    "transformers 5": (lambda f: hub_folder(transformers_5(encoder()), f), ""),
    "transformers, .bin": (
        lambda f: saved(transformers_4(encoder()), f, "pytorch_model.bin").parent, ""),
    "timm, num_classes=0": (lambda f: saved(encoder(), f), ""),
    "torchvision without heads": (lambda f: saved(torchvision(encoder()), f), ""),
    "msn pre-training": (
        lambda f: saved(pre_training(), f, "msn.pth.tar"),
        "weights read from 'target_encoder' > 'module.'; the file also has 'encoder' "
        "(--weights encoder)"),
    "torch.compile": (
        lambda f: saved(prefixed("_orig_mod.", transformers_5(encoder())), f),
        "weights read from '_orig_mod.'"),
    "DistributedDataParallel": (
        lambda f: saved(prefixed("module.", encoder()), f), "weights read from 'module.'"),
    "DistributedDataParallel of torch.compile": (
        lambda f: saved(prefixed("module._orig_mod.", encoder()), f),
        "weights read from 'module.' > '_orig_mod.'"),
    "compiled blocks": (
        lambda f: saved(
            {k.replace(".norm1.", "._orig_mod.norm1."): t for k, t in encoder().items()}, f), ""),
    "activation checkpointing": (
        lambda f: saved(
            {k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t
             for k, t in encoder().items()}, f), ""),
    "PyTorch Lightning": (
        lambda f: saved(
            {"state_dict": prefixed("model.", transformers_4(encoder())), "epoch": 3,
             "optimizer_states": [], "hyper_parameters": {"lr": 0.1}}, f, "epoch=3.ckpt"),
        "weights read from 'state_dict' > 'model.'"),
    "PyTorch Lightning of torch.compile": (
        lambda f: saved({"state_dict": prefixed("model._orig_mod.", encoder())}, f),
        "weights read from 'state_dict' > 'model.' > '_orig_mod.'"),
    "PyTorch's tutorial": (
        lambda f: saved({"epoch": 3, "model_state_dict": encoder(), "optimizer_state_dict": {}}, f),
        "weights read from 'model_state_dict'"),
    "DeepSpeed": (
        lambda f: saved({"module": transformers_4(encoder()), "dp_world_size": 2}, f),
        "weights read from 'module'"),
    "DeepSpeed of Lightning": (
        lambda f: saved({"module": prefixed("_forward_module.model.", encoder())}, f),
        "weights read from 'module' > '_forward_module.' > 'model.'"),
    "AveragedModel": (
        lambda f: saved({"n_averaged": torch.tensor(3), **prefixed("module.", encoder())}, f),
        "weights read from 'module.'"),
    "peft, merged": (
        lambda f: saved(prefixed("base_model.model.", transformers_4(encoder())), f),
        "weights read from 'base_model.' > 'model.'"),
    "self-distillation": (
        lambda f: saved(self_distillation(), f),
        "weights read from 'teacher' > 'backbone.'; the file also has 'student' "
        "(--weights student)"),
    "lightly of torchvision": (
        lambda f: saved({"state_dict": lightly(torchvision(encoder() | head()))}, f),
        "weights read from 'state_dict' > 'backbone.'; the file also has 'anchor_backbone' "
        "(--weights anchor_backbone)"),
    "lightly of timm": (
        lambda f: saved(lightly(encoder() | head()), f),
        "weights read from 'backbone.'; the file also has 'anchor_backbone'"),
}  # fmt: skip

# the same with a classifier, and what it computes
CLASSIFIERS: dict[str, tuple[Write, Callable[[Tensor], Tensor]]] = {
    "transformers 4.57": (lambda f: hub_folder(transformers_4(encoder() | head()), f), of_cls),
    "transformers 5": (lambda f: hub_folder(transformers_5(encoder() | head()), f), of_cls),
    "torchvision": (lambda f: saved(torchvision(encoder() | head()), f), of_cls),
    "timm": (lambda f: saved(encoder() | head(), f), of_cls),
    "timm's training script": (lambda f: saved(timm_training(encoder() | head()), f), of_cls),
    "Lightning": (
        lambda f: saved({"state_dict": prefixed("model.", transformers_4(encoder() | head()))}, f),
        of_cls,
    ),
    "MAE code base, --cls_token": (lambda f: saved(mae(encoder() | head()), f), of_cls),
    "MAE code base, linear probe": (
        lambda f: saved(mae(encoder() | linear_probe()), f), of_probe),
    "MAE code base, --global_pool": (
        lambda f: saved(mae(encoder(norm=False) | fc_norm() | head()), f), of_patches),
    "timm, global_pool=avg": (
        lambda f: saved(encoder(norm=False) | fc_norm() | head(), f), of_patches),
    "msn linear evaluation": (
        lambda f: saved(linear_eval(1), f, "x-lin-eval.pth.tar"), lambda x: of_blocks(x, 1)),
    "msn linear evaluation of 2 blocks": (
        lambda f: saved(linear_eval(2), f), lambda x: of_blocks(x, 2)),
    "msn linear evaluation on many GPUs": (
        lambda f: saved(linear_eval(1, parallel=True), f), lambda x: of_blocks(x, 1)),
}  # fmt: skip
