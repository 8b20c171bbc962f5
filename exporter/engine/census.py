"""Kernels of a compiled engine, and the check that they are what was asked for.

TensorRT-RTX turns ``Cast(half to float), MatMul(fp32 weight), Cast(half)`` into a product in Half:
a weight above 65504 is stored as infinity. Found on SM 8.6, 8.9 and 12.0 with 1.7.1.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from msn_export.engine.kernels import (
    UNKNOWN,
    Constant,
    Kernel,
    gemm_dtype,
    is_closed,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
    parts,
)
from msn_export.errors import BuildError

_NARROW = frozenset({"Half", "BFloat16"})
# A convolution's input channels are padded to a multiple of this, a colour image's 3 to 4.
_CHANNELS = 4


@dataclass(frozen=True, slots=True)
class AskedNode:
    """Requirements of one node of a graph.

    ``fp32``: it computes in fp32. ``bf16``: it computes in bf16 in a graph of fp16. ``moves``: it
    only moves or converts elements. ``product``: it is a matrix product, a convolution or an
    attention core. ``constants`` are the shapes of the weights it reads.
    """

    fp32: bool
    bf16: bool = False
    moves: bool = False
    product: bool = False
    constants: tuple[tuple[int, ...], ...] = ()


def island_faults(kernels: Collection[Kernel], nodes: Mapping[str, AskedNode]) -> list[str]:
    """Name the nodes that are fp32 in the graph and half precision in the engine.

    ``kernels`` are those of one profile, none of them closed; ``nodes`` are all of the graph's.
    """
    wide = {name for name, node in nodes.items() if node.fp32 and not node.moves}
    faults = [
        fault
        for kernel in kernels
        for fault in _faults_of(kernel, [name for name in kernel.layers if name in wide], nodes)
    ]
    named = {layer for kernel in kernels for layer in kernel.layers}
    faults += [
        f"no kernel names {name}, which the graph computes in fp32"
        for name in sorted(wide - named)
        if nodes[name].product
    ]
    return list(dict.fromkeys(faults))


def _faults_of(kernel: Kernel, wide: list[str], nodes: Mapping[str, AskedNode]) -> Iterator[str]:
    if not wide:
        return
    products = [name for name in wide if nodes[name].product]
    multiplies = is_gemm(kernel) or is_convolution(kernel) or is_fused_attention(kernel)
    if products and multiplies and gemm_dtype(kernel) != "Float":
        yield f"{products[0]} multiplies in {gemm_dtype(kernel)}, and the graph asks for fp32"
    elif narrow := _unexplained(kernel, nodes):
        yield f"{wide[0]} is fp32 in the graph, and its kernel has a constant in {narrow.dtype}"
    elif not _computes_wide(kernel):
        yield f"{wide[0]} is fp32 in the graph, and its kernel computes in half precision"


def _computes_wide(kernel: Kernel) -> bool:
    """True where a kernel reads, writes or holds anything in fp32, or casts inside."""
    held = (constant.dtype for constant in kernel.constants)
    touched = {*kernel.inputs, *kernel.outputs, *held}
    return not touched <= _NARROW or any(part[:3] == "Cas" for part in parts(kernel))


def _unexplained(kernel: Kernel, nodes: Mapping[str, AskedNode]) -> Constant | None:
    """Find a constant in half precision that no node in half precision has; scalars are skipped."""
    asked = [nodes[name] for name in kernel.layers if name in nodes]
    sizes = Counter(
        size
        for node in asked
        if not node.fp32
        for shape in node.constants
        for size in {prod(shape), _padded(shape)}
    )
    for constant in kernel.constants:
        if constant.dtype not in _NARROW or prod(constant.shape) <= 1:
            continue
        # queries, keys and values of three products are merged into one
        size = next((n for n in (1, 2, 3) if sizes[prod(constant.shape) // n] >= n
                     and prod(constant.shape) % n == 0), None)  # fmt: skip
        if size is None:
            return constant
        sizes[prod(constant.shape) // size] -= size
    return None


def _padded(shape: tuple[int, ...]) -> int:
    if len(shape) != 4:
        return prod(shape)
    filters, channels, *window = shape
    return prod((filters, -(-channels // _CHANNELS) * _CHANNELS, *window))


# What a GEMM may multiply in, by the precision asked for; the first must occur.
ALLOWED = {
    "fp32": ("Float",),
    "fp16": ("Half",),
    "bf16": ("BFloat16",),
    "int8": ("Int8", "Half", "BFloat16"),
    "fp8": ("FP8", "Half", "BFloat16"),
}


@dataclass(frozen=True, slots=True)
class Census:
    """The kernels of one optimisation profile; every figure is derived from them.

    TensorRT-RTX makes one set of kernels for all its targets, so there is no census a target.
    """

    kernels: tuple[Kernel, ...]
    profile: int = 0

    @property
    def kernels_per_block(self) -> dict[int, int]:
        """Kernels by transformer block, without those that name no block (embedding)."""
        counts = Counter(kernel.block for kernel in self.kernels if kernel.block is not None)
        return {block: counts[block] for block in sorted(counts)}

    @property
    def by_kind(self) -> dict[str, int]:
        """Kernels by TensorRT's LayerType, the most frequent first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def fused_attention(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if is_fused_attention(kernel))

    @property
    def accumulators(self) -> dict[str, int]:
        return dict(Counter(k.accumulator or UNKNOWN for k in self.fused_attention).most_common())

    @property
    def gemms(self) -> tuple[Kernel, ...]:
        """Matrix products, without those inside fused attention."""
        return tuple(kernel for kernel in self.kernels if is_gemm(kernel))

    @property
    def gemm_dtypes(self) -> dict[str, int]:
        return dict(Counter(gemm_dtype(kernel) for kernel in self.gemms).most_common())

    @property
    def convolution_dtypes(self) -> dict[str, int]:
        found = (kernel for kernel in self.kernels if is_convolution(kernel))
        return dict(Counter(gemm_dtype(kernel) for kernel in found).most_common())

    @property
    def layout_only(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if is_layout_only(kernel))

    @property
    def closed(self) -> tuple[Kernel, ...]:
        return tuple(kernel for kernel in self.kernels if is_closed(kernel))

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of constants by dtype; one that several kernels share counts once."""
        constants = {c.name: c for kernel in self.kernels for c in kernel.constants}
        sizes: Counter[str] = Counter()
        for constant in constants.values():
            sizes[constant.dtype] += constant.bytes
        return dict(sizes.most_common())


def by_profile(kernels: tuple[Kernel, ...]) -> tuple[Census, ...]:
    """Make one census a profile: each has its own copy of every kernel, so a sum says nothing."""
    numbers = sorted({kernel.profile for kernel in kernels})
    return tuple(
        Census(tuple(kernel for kernel in kernels if kernel.profile == number), number)
        for number in numbers
    )


def require(
    census: Census,
    *,
    depth: int,
    precision: str,
    allow_unfused: bool = False,
    quantised: Collection[str] = (),
    asked: Mapping[str, AskedNode] | None = None,
) -> None:
    """Require that one profile of an engine is what was asked for.

    ``precision`` is what matrix products must multiply in; for int8 and fp8 those of ``quantised``,
    ONNX nodes, and the rest in fp16 or bf16. Each of ``depth`` blocks must have one fused attention
    kernel. ``asked`` has the graph's nodes: what they compute in fp32 must stay in fp32.
    """
    faults = []
    if not allow_unfused:
        fusion = _fusion_faults(census, depth)
        faults = [f"{fault}; --allow-unfused accepts that" for fault in fusion]
    if not census.closed:
        faults += _precision_faults(census, depth, precision, asked or {})
        faults += _quantisation_faults(census, ALLOWED[precision][0], quantised)
        faults += _shortened(island_faults(census.kernels, asked or {}))
        faults += _sums_faults(census, asked or {})
    if faults:
        where = f" (profile {census.profile})" if census.profile else ""
        raise BuildError(f"engine is not what was asked for{where}: {'; '.join(faults)}")


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shortened(faults: list[str]) -> list[str]:
    more = [f"and {len(faults) - 3} more such"] if len(faults) > 3 else []
    return [*faults[:3], *more]


def _fusion_faults(census: Census, depth: int) -> list[str]:
    if census.closed:
        name = census.closed[0].name[:60]
        return [
            f"fusion and precision are not proven: TensorRT does not tell what is inside {name!r}"
        ]
    fused = census.fused_attention
    if len(fused) == depth:
        return []
    with_one = {kernel.block for kernel in fused}
    without = [str(block) for block in range(depth) if block not in with_one]
    where = f" (none in block {', '.join(without)})" if None not in with_one and without else ""
    return [f"fused attention in {len(fused)} of {depth} blocks{where}"]


def _precision_faults(
    census: Census, depth: int, precision: str, asked: Mapping[str, AskedNode]
) -> list[str]:
    allowed = ALLOWED[precision]
    unread = [
        str(block)
        for block in range(depth)
        if not any(kernel.block == block for kernel in census.gemms)
    ]
    if not census.gemms or (unread and any(kernel.block is not None for kernel in census.gemms)):
        where = f" in block {', '.join(unread)}" if census.gemms else ""
        return [f"no matrix product is recognised{where}, so their precision is not proven"]
    wrong = [
        kernel
        for kernel in (*census.gemms, *census.fused_attention)
        if gemm_dtype(kernel) not in (*allowed, *_also_allowed(kernel, asked))
    ]
    if wrong:
        named = [f"{gemm_dtype(k)} in {'+'.join(k.layers) or k.name}" for k in wrong]
        return [
            f"{len(wrong)} of {len(census.gemms) + len(census.fused_attention)} matrix products "
            f"and attention kernels are not {' or '.join(allowed)}: {_first_three(named)}"
        ]
    if allowed[0] not in census.gemm_dtypes:
        return [f"no matrix product multiplies in {allowed[0]}; is the graph quantised?"]
    return []


def not_multiplied_in(census: Census, dtype: str, products: Collection[str]) -> dict[str, str]:
    """Find the ONNX products that no kernel multiplies in ``dtype`` (TensorRT's spelling).

    Each comes with the dtype it is multiplied in instead; empty where no kernel names it.
    """
    kernels = [*census.gemms, *(k for k in census.kernels if is_convolution(k))]
    found = {layer: gemm_dtype(kernel) for kernel in kernels for layer in kernel.layers}
    return {name: found.get(name, "") for name in products if found.get(name) != dtype}


def _quantisation_faults(census: Census, dtype: str, quantised: Collection[str]) -> list[str]:
    wrong = not_multiplied_in(census, dtype, quantised)
    if not wrong:
        return []
    named = [f"{found or 'no kernel'} for {name}" for name, found in wrong.items()]
    return [
        f"{len(quantised) - len(wrong)} of {len(quantised)} quantised products multiply in "
        f"{dtype}: {_first_three(named)}"
    ]


def _also_allowed(kernel: Kernel, asked: Mapping[str, AskedNode]) -> list[str]:
    products = [asked[layer] for layer in kernel.layers if layer in asked and asked[layer].product]
    return ["Float"] * any(node.fp32 for node in products) + ["BFloat16"] * any(
        node.bf16 for node in products
    )


def _sums_faults(census: Census, asked: Mapping[str, AskedNode]) -> list[str]:
    """Name the attention cores that are typed bf16, for its sums in fp32, and sum in fp16."""
    return [
        f"{layer} is typed bf16, and its kernel sums in {kernel.accumulator or UNKNOWN}"
        for kernel in census.fused_attention
        for layer in kernel.layers
        if layer in asked and asked[layer].bf16 and kernel.accumulator == "fp16"
    ]


def summary(census: Census) -> Mapping[str, Any]:
    """Figures as ``--json`` and manifests name them."""
    return {
        "kernels": len(census.kernels),
        "kernels_per_block": {str(k): v for k, v in census.kernels_per_block.items()},
        "fused_attention": len(census.fused_attention),
        "accumulators": census.accumulators,
        "gemm_dtypes": census.gemm_dtypes,
        "convolution_dtypes": census.convolution_dtypes,
        "layout_only": [
            {"kernel": kernel.name, "block": kernel.block, "layers": list(kernel.layers)}
            for kernel in census.layout_only
        ],
        "kinds": census.by_kind,
        "weight_bytes": census.weight_bytes,
    }
