"""What smoothing is worth, and how far that spreads from one few images to the next."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from quantization_bench import FORMS, Bench, row

from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import FORMATS, Scheme
from msn_export.calibration.search import PROBED, FirstRun
from msn_export.calibration.smoothing import STRENGTHS, smooth
from msn_export.graph import io
from msn_export.spec import Dtype, Observer
from tests.builders import digits

DRAWS = 8


def smoothing_rows(bench: Bench) -> list[str]:
    """Give the share of the error that each strength leaves: mean, least and most of the draws."""
    kept = bench.folder / "smoothing.json"
    if not kept.is_file():
        shares = {
            f"{graph} {form}": left(bench.folder / f"{graph}.onnx", Dtype(form))
            for graph in ("digits", "planted")
            for form in FORMS
        }
        kept.write_text(json.dumps(shares))
    rows = []
    for name, draws in json.loads(kept.read_text()).items():
        found = np.asarray(draws)
        spread = zip(found.mean(axis=0), found.min(axis=0), found.max(axis=0), strict=True)
        cells = (f"{mean:.2f} ({least:.2f} to {most:.2f})" for mean, least, most in spread)
        rows.append(row(*name.split(), *cells))
    return rows


def left(graph: Path, form: Dtype) -> list[list[float]]:
    """Measure it as ``--smooth auto`` does, each time on other images of the training set."""
    planes = digits.load()[0].planes()
    shares = []
    for at in range(0, DRAWS * PROBED, PROBED):
        model = io.load(graph)
        io.infer_shapes(model)
        plan = Plan.of(model, Scheme(FORMATS[form], Dtype.FP16), attention=False)
        with tempfile.TemporaryDirectory() as stage:
            names = [str(index) for index in range(at, at + PROBED)]
            images = planes[at : at + PROBED]
            first = FirstRun.of(plan, images, names, Path(stage), maxima=False)
        errors = smooth(plan, None, first.activations, Observer.MSE)[1].errors or {}
        shares.append([errors[f"{strength:g}"] / errors["off"] for strength in STRENGTHS])
        print(graph.name, form, shares[-1], flush=True)
    return shares
