"""A benchmark's record, made up: three contenders, two batch sizes, ten rounds."""

from dataclasses import replace
from typing import Any

import numpy as np

from msn_export.benchmark.results import Agreed, Bench, Contender, Timing, figures, ratio_of
from msn_export.host import Machine

NAMES = ("eager", "sdpa", "model.onnx")


def made_up(**changes: Any) -> Bench:
    rng = np.random.default_rng(0)
    names = changes.pop("names", NAMES)
    contenders = [
        Contender(
            name, "onnx" if "." in name else name, "somewhere", dtype="fp32", threads=2,
            file=name if "." in name else None, takes="float [b, 3, 32, 32]", open_seconds=1.0,
        )
        for name in names
    ]  # fmt: skip
    timings = []
    for batch in (1, 8):
        rounds = {
            name: (rng.uniform(1, 1.2, (10, 5)) * 1e7 * batch / (index + 1)).astype(int).tolist()
            for index, name in enumerate(names)
        }
        timings += [
            Timing(
                name, batch, **figures(rounds[name], batch),
                ratio=ratio_of(rounds[name], rounds[names[0]]), warm_up_seconds=0.1,
                peak_rss_bytes=10**8, agreement=Agreed(16, 1e-6, 1e-7, 0.9999999, 1.0, 1.0),
            )
            for name in names
        ]  # fmt: skip
    fields: dict[str, Any] = {
        "product": "msn-export 0", "command": "msn-export bench model.onnx", "created": "today",
        "machine": Machine("a processor", 2, 1, 2**34, "a system", "3.11"),
        "versions": {"numpy": "2"},
        "batches": (1, 8), "rounds": 10, "seconds": 1.0, "threads": 2, "pictures": 16,
        "pictures_from": "photographs", "preprocessing": "hf", "baseline": names[0],
        "reference": "a checkpoint, torch, fp32", "load": 0.0, "contenders": tuple(contenders),
        "timings": tuple(timings),
    }  # fmt: skip
    bench = Bench(**{**fields, **changes})
    timings = tuple(replace(one, noisy=one.noisy or bench.busy) for one in bench.timings)
    return replace(bench, timings=timings)
