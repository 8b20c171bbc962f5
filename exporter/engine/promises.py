"""Whether a compiler kept in fp32 what its graph computes in fp32.

TensorRT-RTX turns ``Cast(half to float), MatMul(fp32 weight), Cast(half)`` into a product in Half:
a weight above 65504 is stored as infinity. Found on SM 8.6, 8.9 and 12.0 with 1.7.1.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from msn_export.engine.kernels import Constant, Kernel
from msn_export.engine.roles import gemm_dtype, is_convolution, is_fused_attention, is_gemm, parts

_NARROW = frozenset({"Half", "BFloat16"})
# A convolution's input channels are padded to a multiple of this, a colour image's 3 to 4.
_CHANNELS = 4


@dataclass(frozen=True, slots=True)
class AskedNode:
    """What a graph asks of one of its nodes.

    ``fp32`` says that it computes in fp32, ``bf16`` that it computes in bf16 in a graph of fp16,
    ``moves`` that it only moves or converts elements, ``product`` that it is a matrix product, a
    convolution or an attention core. ``constants`` are the shapes of the weights it reads.
    """

    fp32: bool
    bf16: bool = False
    moves: bool = False
    product: bool = False
    constants: tuple[tuple[int, ...], ...] = ()


def island_faults(kernels: Collection[Kernel], nodes: Mapping[str, AskedNode]) -> list[str]:
    """Say which nodes that the graph computes in fp32 the engine computes in half precision.

    Args:
        kernels: those of one profile, none of them closed.
        nodes: every node of the graph that was compiled, by name.

    Returns:
        A line a fault; it names the node and what the engine makes of it.
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
    """Whether anything of a kernel is fp32: what it reads, writes or holds, or a cast inside it."""
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
        for size in {_elements(shape), _padded(shape)}
    )
    for constant in kernel.constants:
        if constant.dtype not in _NARROW or _elements(constant.shape) <= 1:
            continue
        # queries, keys and values of three products are merged into one
        size = next((n for n in (1, 2, 3) if sizes[_elements(constant.shape) // n] >= n
                     and _elements(constant.shape) % n == 0), None)  # fmt: skip
        if size is None:
            return constant
        sizes[_elements(constant.shape) // size] -= size
    return None


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _padded(shape: tuple[int, ...]) -> int:
    if len(shape) != 4:
        return _elements(shape)
    filters, channels, *window = shape
    return _elements((filters, -(-channels // _CHANNELS) * _CHANNELS, *window))
