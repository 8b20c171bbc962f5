"""Draw README's picture, once for light pages and once for dark ones, from benchmarks/results/.

    python scripts/chart.py

Above: the time of one image on the CPU. Below: the kernels of an fp16 engine. The same figures give the same bytes.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import performance
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# text, what is ours, what is others'
THEMES = {"light": ("#1f2328", "#0b6e4f", "#8c959f"), "dark": ("#e6edf3", "#3fb68b", "#6e7681")}
TIMES = {
    "msn-export int8": "msn-export int8",
    "msn-export, OpenVINO bf16": "msn-export, OpenVINO bf16",
    "torch bf16": "PyTorch, bf16",
    "msn-export, OpenVINO": "msn-export, OpenVINO",
    "bare OpenVINO": "OpenVINO alone, held to fp32",
    "msn-export": "msn-export",
    "torch.onnx.export": "torch.onnx.export",
    "optimum": "optimum",
    "torch compile": "torch.compile",
    "torch sdpa": "PyTorch, SDPA",
}
KERNELS = {
    "msn-export, [CLS]": "msn-export",
    "optimum": "optimum",
    "torch.onnx.export": "torch.onnx.export",
}
Bars = dict[str, float]


def times() -> Bars:
    """Give milliseconds of one image by label."""
    found = performance.result("graphs")["batch 1"]
    return {label: found[who]["wall_ms"] for who, label in TIMES.items()}


def kernels() -> Bars:
    """Give kernels of an engine by label."""
    found = performance.result("kernels")["graphs"]
    return {label: found[who]["kernels"] for who, label in KERNELS.items()}


def draw(theme: str) -> Figure:
    """Draw both charts in a theme's colours."""
    text, ours, others = THEMES[theme]
    settings: dict[str, Any] = {
        "svg.hashsalt": "chart", "font.size": 11, "text.color": text,
        "axes.labelcolor": text, "ytick.color": text, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.6, 5.3))
        figure.patch.set_alpha(0)
        found = performance.result("graphs")
        where = ", ".join(performance.INSTRUCTIONS[one] for one in found["machine"]["instructions"])
        about = (
            "Milliseconds for one image, ViT-B/16, on two CPU cores with\n"
            f"{where}; fp32 and onnxruntime where nothing else is named"
        )
        _bars(figure.add_axes((0.34, 0.335, 0.63, 0.57)), times(), (ours, others), about)
        about = (
            "Kernels of the fp16 engine by the graph's exporter,\nViT-S/16, TensorRT-RTX, SM 8.9"
        )
        _bars(figure.add_axes((0.34, 0.0, 0.63, 0.19)), kernels(), (ours, others), about)
    return figure


def _bars(axes: Axes, bars: Bars, colours: tuple[str, str], title: str) -> None:
    is_ours = [label.startswith("msn-export") for label in bars]
    drawn = axes.barh(
        list(bars), list(bars.values()), color=[colours[not one] for one in is_ours], height=0.72
    )
    axes.bar_label(drawn, fmt="{:.0f}", padding=4)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11, x=-0.52)
    axes.set_xlim(0, 1.15 * max(bars.values()))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.patch.set_alpha(0)


def save(theme: str, path: Path) -> None:
    """Write a theme's picture as SVG."""
    with mpl.rc_context({"svg.hashsalt": "chart"}):
        draw(theme).savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    for name in THEMES:
        save(name, IMAGES / f"cpu-{name}.svg")
