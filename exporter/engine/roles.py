"""What a kernel does, told from its record: the names are TensorRT's and mean something.

Generated kernels are called ``__myl_`` and what they fuse: ``__myl_FcAddCast_myl0_4`` is a matrix
product, an addition and a cast. Checked on SM 7.5 to 12.0 in fp32, fp16, bf16, int8 and fp8.
"""

import re

from msn_export.engine.kernels import Kernel

_FUSED_ATTENTION = re.compile(r"(?:__mye\d+)?_ge(?:mm|mv)_mha")
_GENERATED = re.compile(r"__myl_([A-Za-z]+?)(?:_myl\d+_\d+)?")
_GEMM_KINDS = frozenset({"gemm", "MatrixMultiply", "FullyConnected", "Gemm"})
_CONVOLUTION_KINDS = frozenset({"correlation", "Convolution", "CaskConvolution"})
_LAYOUT_KINDS = frozenset({"Reformat", "Shuffle", "Slice", "Concatenation", "NoOp"})
# Parts of a generated kernel's name that move or copy elements; older TensorRTs cut to 3 letters.
_MOVES = frozenset({"Move", "Resh", "Tran", "Slic", "Conc", "Repl", "Cast", "Gath", "Copy", "Expa"})
_MOVES_3 = frozenset(move[:3] for move in _MOVES)
# Layers whose inside TensorRT does not tell (8.6: a whole transformer is one of them).
_CLOSED = re.compile(r"\{?ForeignNode\[|Myelin$")
_WIDTH = ("Float", "Half", "BFloat16", "FP8", "Int8", "FP4", "Int4")  # the widest first


def is_fused_attention(kernel: Kernel) -> bool:
    """Tell TensorRT's fused attention from an ONNX node that is merely called mha."""
    return bool(_FUSED_ATTENTION.match(kernel.name))


def is_gemm(kernel: Kernel) -> bool:
    """Tell a matrix product, alone or with what follows it, outside of fused attention."""
    return kernel.kind in _GEMM_KINDS or "Fc" in parts(kernel)


def is_layout_only(kernel: Kernel) -> bool:
    """Tell a kernel that moves, copies or converts elements and computes nothing."""
    found = parts(kernel)
    moves = bool(found) and all(part in _MOVES or part in _MOVES_3 for part in found)
    return moves or kernel.kind in _LAYOUT_KINDS


def gemm_dtype(kernel: Kernel) -> str:
    """Give the dtype a matrix product or convolution multiplies in.

    That of its largest constant of two or more dimensions, which is the weight; without one (two
    activations) the widest of its inputs, so that a doubtful case never passes as narrower. Not
    the inputs where there is a weight: a fused residual is an input too.
    """
    matrices = [c for c in kernel.constants if sum(size > 1 for size in c.shape) >= 2]
    if matrices:
        return max(matrices, key=lambda constant: constant.bytes).dtype
    return min(kernel.inputs, key=_narrowness, default="unknown")


def _narrowness(dtype: str) -> int:
    return _WIDTH.index(dtype) if dtype in _WIDTH else -1


def parts(kernel: Kernel) -> list[str]:
    """Split ``__myl_FcAddCast_myl0_4`` into Fc, Add, Cast; other kernels have no parts."""
    match = _GENERATED.fullmatch(kernel.name)
    return re.findall(r"[A-Z][a-z0-9]*", match[1]) if match else []


def is_closed(kernel: Kernel) -> bool:
    """Tell a layer whose kernels TensorRT does not list."""
    return bool(_CLOSED.match(kernel.name) or _CLOSED.match(kernel.kind))


def is_convolution(kernel: Kernel) -> bool:
    """Tell a convolution: in a ViT, the patch embedding."""
    return kernel.kind in _CONVOLUTION_KINDS
