"""Write docs/evidence.md from what the benchmarks without a card found.

python scripts/evidence.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROLES = ("products", "attention", "norms", "other", "layout only")


def result(name: str) -> Any:
    """Read the results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(*cells: object) -> str:
    """Write a row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def bounds(found: Any) -> list[str]:
    """Give each engine's least time on each card, and what it is made of."""
    rows = []
    for engine in found["engines"]:
        for card in engine["cards"]:
            shares = (card["roles"].get(role, {"us": 0.0})["us"] / card["us"] for role in ROLES)
            rows.append(row(
                engine["variant"], engine["precision"], card["card"]["name"], engine["kernels"],
                f"{card['us'] / 1e3:.2f}", *(f"{share:.0%}" for share in shares),
                f"{card['us_without_activations'] / 1e3:.2f}",
            ))  # fmt: skip
    return rows


def cards(found: Any) -> list[str]:
    """Give the data sheets."""
    return [
        row(
            card["card"]["name"], f"{card['card']['bandwidth'] / 1e9:.0f}",
            f"{card['card']['rates']['Half'] / 1e12:.0f}",
            f"{card['card']['half_sums'] / 1e12:.0f}",
            f"{card['card']['rates']['Int8'] / 1e12:.0f}", card["card"]["source"],
        )
        for card in found["engines"][0]["cards"]
    ]  # fmt: skip


def widths(counts: dict[str, int]) -> str:
    """Write how many accesses there are of each width."""
    return ", ".join(f"{count} of {size} B" for size, count in counts.items()) or "none"


def generated(found: Any) -> list[str]:
    """Give what was counted of each kernel that compiles here."""
    return [
        row(f"`{one['kernel']}`", one["registers"], widths(one["loads"]), widths(one["stores"]), one["local"])
        for one in found["kernels"]
        if "refused" not in one
    ]  # fmt: skip


def patches(found: Any) -> list[str]:
    """Give the forms of the patch embedding."""
    return [
        row(
            one["form"], one["kernels"], f"{one['bytes'] / 1e6:.1f}",
            f"{one['operations'] / 1e9:.2f}", widths(one.get("stores", {})),
        )
        for one in found["forms"]
    ]  # fmt: skip


PAGE = """# Evidence without a card

No GPU has run these engines here. This page shows what can be known without one: a lower bound for the time of each kernel, and
the machine code of the generated ones. The compiler ({compiler}) compiles for SM {capability} on a CPU. `scripts/evidence.py`
writes the page from `benchmarks/results/`.

## Least time of each engine

    python benchmarks/roofline.py --images PICTURES

The compiler's log has the sizes of all tensors of a kernel. A kernel takes at least the longer of two times: its operations at
the card's highest rate, and its bytes at the memory bandwidth, each tensor once. *Least time* is the sum over all kernels, in ms
for a batch of {batch} uint8 images, [CLS] out. The shares are parts of it. *Layout only* kernels move or convert elements and
compute nothing. An L2 cache can hold activations between two kernels, so a real time can be below the sum. It cannot be below
the last column: all operations, or weights, images and outputs at the memory bandwidth, whichever is longer.

| shape | precision | card | kernels | least time, ms | products | attention | norms | other | layout only | without activations, ms |
|---|---|---|---|---|---|---|---|---|---|---|
{bounds}

The cards' data sheets, without sparsity. The rate with sums in fp16 is for attention, which may have them:

| card | GB/s | fp16, TFLOP/s | with sums in fp16 | int8, TOP/s | source |
|---|---|---|---|---|---|
{cards}

These are bounds, not predictions: no kernel reaches both limits, and a launch of a kernel costs time too. They show where a
change of the graph can gain. The layout-only kernels are a small part of the bound. *Other* in fp16 is mostly one kernel per
block, which splits and scales queries, keys and values before attention. In int8 it has two more per block: the compiler does not
fuse GELU and quantisation into fc1, and the kernel that joins the heads quantises too. On the card with the slower memory these
kernels take as long as 8-bit products save, unless the cache holds their activations.

## Generated kernels

    pip install --target CUDA nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12
    pip install --target CUDA/tools nvidia-cuda-nvdisasm
    python benchmarks/generated_kernels.py --cuda CUDA

TensorRT-RTX keeps the CUDA source of the kernels that it generated as text in the engine, and compiles it on the user's machine.
NVRTC and nvdisasm do the same here. Loads and stores are instructions in the machine code, by width; *spills* are accesses to
local memory. vit-msn-small, fp16, {input} in, batch {kernel_batch}, SM {capability}:

| kernel | registers | loads | stores | spills |
|---|---|---|---|---|
{generated}

{refused} other kernels (norms and attention) include headers of the compiler, which are not taken out of it.

## Patch embedding

    python benchmarks/patch_forms.py --cuda CUDA

The first kernel casts the image and pads three channels to four, and stores two bytes at a time. A form that makes a row of each
patch and multiplies stores sixteen, moves less and needs no padding. Batch {patch_batch}:

| form | kernels | MB moved | GFLOP | stores of the first kernel |
|---|---|---|---|---|
{patches}

In the whole engine (vit-msn-small, fp16) there are {before} kernels with the convolution and {after} with the product; the least
time changes by {gains}. The reshape after the convolution costs no kernel there: it is
fused with the first norm. The graph keeps its convolution: the gain is small, and a GPU has not shown it.
"""


def main() -> None:
    """Write the page."""
    roofline, kernels, forms = (
        result(name) for name in ("roofline", "generated_kernels", "patch_forms")
    )
    before, after = forms["engines"]["convolution"], forms["engines"]["product"]
    gains = " and ".join(
        f"{after['us'][card] / least - 1:+.1%} ({card})" for card, least in before["us"].items()
    )
    page = PAGE.format(
        compiler=roofline["compiler"], capability=roofline["capability"], batch=roofline["batch"],
        bounds="\n".join(bounds(roofline)), cards="\n".join(cards(roofline)),
        input=kernels["input"], kernel_batch=kernels["batch"],
        generated="\n".join(generated(kernels)),
        refused=sum("refused" in one for one in kernels["kernels"]),
        patch_batch=forms["batch"], patches="\n".join(patches(forms)),
        before=before["kernels"], after=after["kernels"], gains=gains,
    )  # fmt: skip
    (ROOT / "docs" / "evidence.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
