"""Write the tables and figures of docs/performance.md and of README from benchmarks/results/.

    python scripts/performance.py

Each ratio is the median of the ratios of single rounds: in a round all contenders run once, so load from outside meets
both sides. Nothing is measured here.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pages import replace_part

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE, CHOOSE = ROOT / "docs" / "performance.md", ROOT / "docs" / "choose.md"
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "amx_int8": "AMX",
}
LAST_BLOCK = {
    "full": "all tokens",
    "last block for [CLS], one projection": "[CLS] alone, one projection",
    "last block for [CLS], queries apart": "[CLS] alone, queries apart",
}


def result(name: str) -> dict[str, Any]:
    """Read a file of benchmarks/results/."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay out a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine(found: dict[str, Any]) -> str:
    """Name the processor of a result, and its instruction sets where they were recorded."""
    of = found["machine"]
    names = [INSTRUCTIONS[one] for one in of.get("instructions", ()) if one in INSTRUCTIONS]
    text = f"{of['cores']} cores of {of.get('cpu', of.get('processor'))}"
    return f"{text}, {', '.join(names)}" if names else text


def kernels() -> str:
    """Lay out the kernels of each exporter's graph."""
    found = result("kernels")
    graphs = found["graphs"]
    return table(
        ("graph", "nodes", "multiply-adds", "kernels", "fused attention"),
        (
            (
                who,
                of["nodes"],
                f"{of['multiply_adds'] / 1e9:.3f} billion"
                if of["multiply_adds"]
                else "not counted",
                of["kernels"],
                f"{of['fused']} of 12",
            )
            for who, of in graphs.items()
        ),
    )


def forms() -> str:
    """Lay out every form of attention and of the last block."""
    return table(
        ("last block", "attention", "nodes", "10⁹ multiply-adds", "kernels", "fused", "time"),
        (
            (
                LAST_BLOCK[one["last block"]],
                one["form"],
                one["nodes"],
                f"{one['multiply_adds'] / 1e9:.3f}",
                one["kernels"],
                one["fused"],
                f"{one['ratio']:.2f}",
            )
            for one in result("forms")["forms"]
        ),
    )


def foldings() -> str:
    """Lay out the foldings of constants."""
    return table(
        ("folding", "nodes", "kernels", "moved"),
        (
            (name, of["nodes"], of["kernels"], f"{of['moved']:.0e}")
            for name, of in result("foldings").items()
        ),
    )


EXPORTS = {
    "msn-export": "msn-export, checked on 16 photographs",
    "msn-export --no-check": "msn-export `--no-check`",
    "optimum": "optimum, checked on two random images",
    "torch.onnx.export": "torch.onnx.export, not checked",
}


def export() -> str:
    """Lay out the time and memory of an export."""
    found = result("export")
    runs = found["runs"]
    rows = []
    for who, name in EXPORTS.items():
        of, ratio = found["medians"][who], found["ratios"][who]
        rows.append(
            (
                name,
                f"{of['wall_s']:.1f}",
                f"{ratio['wall_s']:.2f}",
                f"{of['cpu_s']:.1f}",
                f"{of['peak_gb']:.2f}",
                f"{ratio['peak_gb']:.2f}",
            )
        )
    head = ("", "wall, s", "ratio", "processor, s", "peak memory, GB", "ratio")
    return f"Measured on {machine(found)}; {len(runs['optimum'])} rounds.\n\n{table(head, rows)}"


def calibrate() -> str:
    """Lay out the time and memory of a calibration, beside an earlier commit."""
    found = result("calibrate")
    rows = []
    for who, name in (("this", "msn-export"), ("base", f"commit {found['base']}")):
        of, ratio = found["medians"][who], found["ratios"] if who == "this" else {}
        rows.append(
            (
                name,
                f"{of['wall_s']:.1f}",
                f"{ratio.get('wall_s', 1):.2f}",
                f"{of['cpu_s']:.1f}",
                f"{of['peak_gb']:.2f}",
                f"{ratio.get('peak_gb', 1):.2f}",
            )
        )
    head = ("", "wall, s", "ratio", "processor, s", "peak memory, GB", "ratio")
    about = f"Measured on {machine(found)}; {len(found['runs']['base'])} rounds."
    return f"{about}\n\n{table(head, rows)}"


def growth() -> str:
    """Lay out how time and memory of each command grow with its images and with the model."""
    from growth import exponents

    found = result("growth")
    commits = ", ".join(sorted({run["commit"] for run in found["runs"]}))
    head, *rows = exponents(found)
    about = f"Measured on {machine(found)}; commit {commits}; {len(found['runs'])} runs."
    return f"{about}\n\n{table(head, rows)}"


def embed() -> str:
    """Lay out the time of ``embed`` beside that of its parts."""
    found = result("embed_speed")
    rows = [
        (
            name,
            of["batch"],
            *(f"{of[figure]:.1f}" for figure in ("decode_ms", "model_ms", "embed_ms")),
            f"{of['ratio']:.2f}",
        )
        for name, of in found.items()
        if isinstance(of, dict) and "ratio" in of
    ]
    head = ("runtime", "batch", "decoding, ms", "bare model, ms", "`embed`, ms", "ratio")
    rounds = len(found["onnxruntime"]["rounds"])
    about = f"{found['model']}, {found['count']} and {2 * found['count']} pictures"
    return f"{about}; {machine(found)}; {rounds} rounds.\n\n{table(head, rows)}"


def cpu_forms() -> str:
    """Lay out other forms of the graph for a CPU, in both runtimes."""
    found = result("cpu_forms")
    by: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for row in found["rows"]:
        if row["form"] != "as written":
            cells = by.setdefault((row["precision"], row["form"]), {})
            cells[row["runtime"], row["batch"]] = f"{row['ratio']:.2f}"
    columns = [(runtime, batch) for runtime in ("onnxruntime", "openvino") for batch in (1, 8)]
    rounds = " and ".join(str(count) for count in sorted({row["rounds"] for row in found["rows"]}))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    names = {"openvino": "OpenVINO"}
    head = ("", "form", *(f"{names.get(one, one)}, batch {batch}" for one, batch in columns))
    rows = [(*key, *(cells.get(column, "") for column in columns)) for key, cells in by.items()]
    return f"{machine(found)}; {versions}; {rounds} rounds.\n\n{table(head, rows)}"


# contenders of the results that tables name otherwise
NAMES = {"bare OpenVINO": "bare OpenVINO, held to fp32"}
BASES = {
    "optimum": "against optimum's graph",
    "torch sdpa": "against torch SDPA",
    "msn-export": "against ours in onnxruntime",
}


def graphs(name: str, instructions: str) -> str:
    """Lay out the times of graphs on one processor; ``instructions`` where it has no record."""
    found = result(name)
    batches = [key for key in found if key.startswith("batch ")]
    bases = [base for base in BASES if f"wall x {base}" in found[batches[0]]["optimum"]]
    rows = []
    for key in batches:
        for who, of in found[key].items():
            if not isinstance(of, dict):
                continue
            times = (f"{of['wall_ms']:.0f}", f"{of['cpu_ms']:.0f}")
            ratios = [f"{of[f'wall x {base}']:.2f}" for base in bases]
            name_of = NAMES.get(who, who)
            rows.append(
                (key.removeprefix("batch "), name_of, *times, *ratios, f"{of['cosine']:.5f}")
            )
    head = ("batch", "contender", "ms", "processor ms", *(BASES[base] for base in bases), "cosine")
    rounds = " and ".join(f"{found[key]['rounds']} rounds at {key}" for key in batches)
    where = machine(found) + (f", {instructions}" if instructions else "")
    about = f"{where}; {found['threads']} threads; {rounds}; `benchmarks/results/{name}.json`."
    return f"{about}\n\n{table(head, rows)}"


def choices() -> str:
    """Say in a table what OpenVINO gives where AVX512 is."""
    found = result("graphs")

    def ratio(who: str, base: str) -> tuple[str, ...]:
        return tuple(f"{found[f'batch {n}'][who][f'wall x {base}']:.2f}" for n in (1, 8))

    rows = [
        ("`open_runner(path, providers=[\"openvino\"])`, fp32", "ours in onnxruntime",
         *ratio("msn-export, OpenVINO", "msn-export")),
        ("… with `precision=\"bf16\"`, where its gate allows", "ours in onnxruntime",
         *ratio("msn-export, OpenVINO bf16", "msn-export")),
        ("… of the int8 graph", "int8 in onnxruntime",
         *ratio("msn-export int8, OpenVINO", "msn-export int8")),
        ("our runner on OpenVINO, fp32", "OpenVINO alone on the same graph, held to fp32",
         *ratio("msn-export, OpenVINO", "bare OpenVINO")),
    ]  # fmt: skip
    return table(("", "time against", "batch 1", "batch 8"), rows)


def products() -> str:
    """Give the speed of plain matrix products, which bounds every contender."""
    rows = []
    for name, where in (("graphs", "AVX512"), ("graphs-avx2", "AVX2")):
        peak = result(name)["peak_gflops"]
        rows.append((where, f"{peak['onnxruntime']:.0f}", f"{peak['torch']:.0f}"))
    return table(("plain matrix products, GFLOP/s", "onnxruntime", "PyTorch"), rows)


PRECISIONS = {
    "fp32": (
        "msn-export", "msn-export, OpenVINO", "bare OpenVINO", "optimum", "torch.onnx.export", "torch compile",
        "torch sdpa",
    ),
    "bf16": ("msn-export, OpenVINO bf16", "torch bf16"),
    "int8": ("msn-export int8", "msn-export int8, OpenVINO"),
}  # fmt: skip


def summary() -> str:
    """Give the ratios that a reader compares tools by, on both processors, precision by precision."""
    rows = []
    for precision, contenders in PRECISIONS.items():
        for name, where in (("graphs", "AVX512, VNNI, BF16"), ("graphs-avx2", "AVX2")):
            found = result(name)
            for who in (one for one in contenders if one in found["batch 1"]):
                of = [f"{found[f'batch {n}'][who]['wall x optimum']:.2f}" for n in (1, 8)]
                rows.append((precision, where, NAMES.get(who, who), *of))
    return table(("precision", "processor", "contender", "batch 1", "batch 8"), rows)


def precisions() -> str:
    """Say what a lower precision costs and gains on a CPU, against our fp32 graph in onnxruntime."""
    found = result("graphs")
    batches = [found["batch 1"], found["batch 8"]]
    rows = [
        (precision, how, *(f"{of[who]['wall x msn-export']:.2f}" for of in batches),
         f"{min(min(of[who]['cosine'], 1) for of in batches):.5f}",
         f"{max(of[who]['max_abs'] for of in batches):.0e}")
        for who, precision, how in (
            ("msn-export", "fp32", "onnxruntime, the default"),
            ("msn-export, OpenVINO", "fp32", "OpenVINO"),
            ("msn-export, OpenVINO bf16", "bf16", "OpenVINO with `--precision bf16`; the same fp32 file"),
            ("msn-export int8", "int8", "`calibrate --int8`, onnxruntime"),
            ("msn-export int8, OpenVINO", "int8", "`calibrate --int8`, OpenVINO"),
            ("msn-export int8, the rest fp16", "int8 beside fp16", "onnxruntime; this form is for TensorRT"),
        )
    ]  # fmt: skip
    head = ("precision", "how", "time, batch 1", "time, batch 8", "least cosine", "max_abs")
    return table(head, rows)


PARTS = {
    (PERFORMANCE, "kernels"): kernels,
    (PERFORMANCE, "forms"): forms,
    (PERFORMANCE, "foldings"): foldings,
    (PERFORMANCE, "export"): export,
    (PERFORMANCE, "calibrate"): calibrate,
    (PERFORMANCE, "graphs"): lambda: graphs("graphs", ""),
    (PERFORMANCE, "graphs-avx2"): lambda: graphs("graphs-avx2", "AVX2 alone"),
    (PERFORMANCE, "choices"): choices,
    (PERFORMANCE, "products"): products,
    (PERFORMANCE, "growth"): growth,
    (PERFORMANCE, "embed"): embed,
    (PERFORMANCE, "cpu-forms"): cpu_forms,
    (CHOOSE, "ratios"): summary,
    (CHOOSE, "precisions"): precisions,
}


def main() -> None:
    """Write every part."""
    for (page, name), part in PARTS.items():
        replace_part(page, name, part())


if __name__ == "__main__":
    main()
