"""Compile every published shape in half precision for three GPUs, and write docs/engines.md.

    python scripts/engines.py [SHAPE...]

Beside ours stands the graph that a user gets elsewhere: Hugging Face's ViTMSNModel in half precision
through torch.onnx.export, compiled by the same backend with the same options. Needs no GPU; about
half an hour on two cores. With shapes named, prints their rows and writes nothing.
"""

import contextlib
import io as stdio
import json
import logging
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export.engine.build import BuildResult, build_engine
from msn_export.engine.options import BuildSpec, find_backend
from msn_export.models.config import VARIANTS, VitConfig
from msn_export.spec import BatchRange, ComputeCapability

BATCH = BatchRange(1, 8, 32)
CAPABILITIES = ("8.6", "8.9", "12.0")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
OPSETS = (18, 23)

HEAD = """# Engines of every published shape

Compiled with TensorRT-RTX {rtx} for three GPU generations, batch {batch}, `--head tokens`, on two CPU cores without
a GPU: kernels were counted, not run. *Elsewhere* is Hugging Face's `ViTMSNModel` in the same
precision through `torch.onnx.export(dynamo=True)` at opset 18 and 23 (torch {torch}, transformers {hf}),
compiled by the same backend. *Fused* is the number of fused attention kernels. All matrix products of our
engines run in the requested precision. Weights are random; kernels do not depend on them.

The 112 kernels of README's picture were counted for SM 8.9. Name the SM of your GPU, as in `--compute-capability 8.9`. Without it,
TensorRT-RTX writes one engine for every GPU from SM 8.0 on, except SM 9.0 and 10.0. Such an engine has the code for SM 8.0: for
vit-msn-small in fp16 it differs from the engine for 8.9 in 26 bytes, while the engine for 12.0 has the same list of kernels and
other code. An engine for a named SM is refused on another GPU, with the command that rebuilds it. A precision that the named SM
does not have is refused before the engine is compiled. TensorRT takes no SM: it compiles for the GPU of the machine.

    python scripts/engines.py

| shape | precision | SM | kernels | a block | fused | matrix products | s | MB | elsewhere, opset 18: kernels, fused | opset 23 |
|---|---|---|---|---|---|---|---|---|---|---|
"""


FORMS = Path(__file__).parent.parent / "benchmarks" / "results" / "block_forms.json"
FORMS_SECTION = """
## Kernels of other forms

    python benchmarks/block_forms.py

{blocks} blocks of ViT-S in fp16, {compiler}, SM {capability}: kernels, and how many of them only move data. All attention is
fused in each. *Packed* is the product's form. Sequence-major blocks take [tokens, batch, width]. Try the script again with each
new compiler: a form with fewer kernels is worth a change of the graph.

| form of the projections | batch 1 | batch 1:8:32 |
|---|---|---|
{rows}

No form has fewer kernels than the packed one. With a dynamic batch, the compiler puts a copy before and after its attention
kernel, whatever the layout is. Three projections need no copy at a fixed batch of 1, but three more kernels.
"""


def ours(variant: str, dtype: str, folder: Path) -> Path:
    """Export a shape in half precision."""
    path = folder / f"{variant}-{dtype}.onnx"
    command = [
        sys.executable, "-m", "msn_export", "onnx", f"random:{variant}:0", "--head", "tokens", "--dtype", dtype,
        "--islands", "none", "--no-check", "-o", str(path), "--force", "--json",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return path


class Tokens(torch.nn.Module):
    """Hugging Face's model with its last hidden state as the output."""

    def __init__(self, model: ViTMSNModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run."""
        return self.model(pixel_values).last_hidden_state


def elsewhere(config: VitConfig, dtype: torch.dtype, opset: int, path: Path) -> Path:
    """Export Hugging Face's model of the same shape."""
    settings = ViTMSNConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        image_size=config.image_size[0],
        patch_size=config.patch_size[0],
    )
    torch.manual_seed(0)
    model = Tokens(ViTMSNModel(settings)).eval().to(dtype)
    example = torch.zeros(2, 3, *config.image_size, dtype=dtype)
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdio.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (example,), path, dynamo=True, opset_version=opset, external_data=False,
            dynamic_shapes=({0: "batch"},), input_names=["pixel_values"], verbose=False,
        )  # fmt: skip
    return path


def compile_for(graph: Path, capability: str, folder: Path) -> BuildResult:
    """Compile one graph for one GPU generation."""
    spec = BuildSpec(graph, (BATCH,), (ComputeCapability.parse(capability),))
    return build_engine(spec, find_backend("tensorrt-rtx"), folder / "built.engine")


def rows(variant: str, config: VitConfig, folder: Path) -> list[str]:
    """Compile all graphs of one shape; give the table's rows."""
    made = []
    for dtype, torch_dtype in DTYPES.items():
        graphs = {opset: folder / f"hf-{opset}.onnx" for opset in OPSETS}
        for opset, path in graphs.items():
            elsewhere(config, torch_dtype, opset, path)
        own = ours(variant, dtype, folder)
        for capability in CAPABILITIES:
            built = compile_for(own, capability, folder)
            census = built.census
            blocks = sorted(set(census.kernels_per_block.values()))
            others = [compile_for(path, capability, folder).census for path in graphs.values()]
            cells = [
                variant, dtype, capability, len(census.kernels),
                " to ".join(str(count) for count in dict.fromkeys((blocks[0], blocks[-1]))),
                f"{len(census.fused_attention)}/{config.depth}",
                ", ".join(f"{count} {name}" for name, count in census.gemm_dtypes.items()),
                f"{built.seconds:.1f}", f"{built.bytes / 1e6:.1f}",
                *(f"{len(other.kernels)}, {len(other.fused_attention)}" for other in others),
            ]  # fmt: skip
            made.append("| " + " | ".join(str(cell) for cell in cells) + " |")
            print(made[-1], flush=True)
            if len(census.kernels) >= min(len(other.kernels) for other in others):
                raise SystemExit(f"{variant} {dtype} {capability}: ours has no fewer kernels")
    return made


def forms() -> str:
    """Write the section on what benchmarks/block_forms.py counted."""
    found = json.loads(FORMS.read_text())
    counted: dict[str, dict[str, str]] = {}
    for row in found["forms"]:
        shown = f"{row['kernels']}, {row['layout_only']}" if "kernels" in row else "refused"
        counted.setdefault(row["form"], {})[row["batch"]] = shown
    table = [f"| {form} | {one['1']} | {one['1:8:32']} |" for form, one in counted.items()]
    return FORMS_SECTION.format(
        compiler=found["compiler"], capability=found["capability"], blocks=found["blocks"],
        rows="\n".join(table),
    )  # fmt: skip


def main(shapes: list[str]) -> None:
    """Compile everything and write the page; or print the rows of some shapes."""
    import tensorrt_rtx
    import transformers

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        table = [
            row for name in shapes or VARIANTS for row in rows(name, VARIANTS[name], Path(folder))
        ]
    if shapes:
        return
    head = HEAD.format(
        rtx=tensorrt_rtx.__version__, batch=BATCH, torch=torch.__version__,
        hf=transformers.__version__,
    )  # fmt: skip
    page = head + "\n".join(table) + f"\n\nPython {platform.python_version()}.\n" + forms()
    Path("docs/engines.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
