"""Compare attention whose sums are fp16 with attention in bf16; write the table of tolerances.md.

    python scripts/attention_sums.py

One head of size 64, as all published shapes have, and 64 queries, at the published numbers of
tokens, against float64: queries and keys are drawn with a standard deviation of 1 and 4 (attention
flat and sharp), values with 1. Both kernels of TensorRT-RTX are emulated by the check's own code.
Ten seconds.
"""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from msn_export.graph.emulate import emulate_attention

TOLERANCES = Path("docs/tolerances.md")
SIZE, QUERIES = 64, 64  # of a head; enough rows for a figure of two digits
GRAPH = """
<ir_version: 11, opset_import: ["" : 23]>
g (float16[b,1,{m},{d}] q, float16[b,1,{n},{d}] k, float16[b,1,{n},{d}] v)
  => (float16[b,1,{m},{d}] y) {{ y = Attention (q, k, v) }}
"""

Array = NDArray[np.floating]


def run(model: ir.Model, feeds: dict[str, Array]) -> Array:
    """Run a graph's first output."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(["y"], feeds)[0]
    return result


def error(got: Array, feeds: dict[str, Array]) -> str:
    """Give the relative error against float64."""
    q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * SIZE**-0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = p @ v / p.sum(-1, keepdims=True)
    return f"{np.linalg.norm(got - wanted) / np.linalg.norm(wanted):.1e}"


def row(tokens: int, spread: float) -> str:
    """Measure one length and sharpness."""
    text = GRAPH.format(m=QUERIES, n=tokens, d=SIZE)
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        node.name = "core"
    rng = np.random.default_rng(0)
    feeds = {
        name: (rng.standard_normal((1, 1, rows, SIZE)) * deviation).astype(np.float16)
        for name, rows, deviation in (("q", QUERIES, spread), ("k", tokens, spread),
                                      ("v", tokens, 1.0))
    }  # fmt: skip
    cells = (
        str(tokens), f"{spread:g}", error(run(model, feeds), feeds),
        error(run(emulate_attention(model, fp16=["core"]).model, feeds), feeds),
        error(run(emulate_attention(model, bf16=["core"]).model, feeds), feeds),
        f"{65504 / tokens:.0f}",
    )  # fmt: skip
    print(*cells, sep=" | ", flush=True)
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the table."""
    rows = [row(tokens, spread) for tokens in (197, 1025, 3137) for spread in (1.0, 4.0)]
    titles = ("tokens", "deviation of q and k", "fp16 on the CPU", "fp16, sums in fp16",
              "bf16, sums in fp32", "value that may overflow the sum")  # fmt: skip
    table = "\n".join(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *rows])
    text = TOLERANCES.read_text(encoding="utf-8")
    pattern = r"(<!-- measured: attention -->\n).*?(<!-- /measured -->)"
    TOLERANCES.write_text(
        re.sub(pattern, rf"\g<1>{table}\n\g<2>", text, flags=re.S), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
