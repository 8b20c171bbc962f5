"""Fix the image size of a graph whose exporter left it dynamic: the position embedding knows it.

Hugging Face optimum marks channels, height and width of every vision model dynamic. The graph of a
ViT runs for one size all the same: its position embedding is added as it is.
"""

import math

import onnx_ir as ir

from msn_export.spec import ImageSize


def fix_image_size(model: ir.Model) -> ImageSize | None:
    """Write height, width and channels into the image input's shape, in place.

    Returns:
        The size; None where nothing was dynamic, or where patches and position embedding do not
        tell (a grid that is not square might be turned).
    """
    for conv in model.graph:
        image = conv.inputs[0] if conv.op_type == "Conv" else None
        if image is None or not image.is_graph_input() or image.shape is None:
            continue
        kernel = _patch_kernel(conv)
        if kernel is None or all(isinstance(size, int) for size in image.shape[1:]):
            return None
        dim, channels, height, width = kernel
        side = _square_grid(model.graph, dim)
        if side is None:
            return None
        size = ImageSize(side * height, side * width)
        image.shape = ir.Shape([image.shape[0], channels, size.height, size.width])
        return size
    return None


def _patch_kernel(conv: ir.Node) -> tuple[int, ...] | None:
    """Give [dim, c, height, width] of a convolution that cuts an image into patches."""
    weight = conv.inputs[1]
    strides = conv.attributes.get("strides")
    if weight is None or weight.const_value is None or strides is None:
        return None
    shape: tuple[int, ...] = tuple(weight.const_value.shape.numpy())
    return shape if len(shape) == 4 and list(shape[2:]) == list(strides.as_ints()) else None


def _square_grid(graph: ir.Graph, dim: int) -> int | None:
    """Find the position embedding [1, 1 + side * side, dim] among what is added, and its side."""
    for node in graph:
        if node.op_type != "Add":
            continue
        for value in node.inputs:
            table = None if value is None else value.const_value
            shape = () if table is None else tuple(table.shape.numpy())
            if len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] == dim:
                side = math.isqrt(shape[1] - 1)
                return side if side * side == shape[1] - 1 else None
    return None
