"""Time on a GPU with CUDA events, and what the card can do at best."""

from __future__ import annotations

import torch
from gpu_contenders import DEVICE, Run

BURST = (
    0.02  # seconds that one timing lasts at least: a CUDA event resolves about half a microsecond
)


def milliseconds(run: Run, inputs: list[torch.Tensor], calls: int) -> float:
    """Time ``calls`` calls on the current stream with CUDA events; milliseconds a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in range(calls):
        run(inputs[call % len(inputs)])
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def calls_of_a_burst(run: Run, inputs: list[torch.Tensor]) -> int:
    """Warm a contender up (it compiles, captures), and say how many calls fill a burst."""
    milliseconds(run, inputs, 10)
    once = milliseconds(run, inputs, 10)
    return max(len(inputs), int(BURST * 1000 / once))


def time_all(
    runs: dict[str, Run], calls: dict[str, int], inputs: list[torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Run every contender in every round, the order rotated; milliseconds a call."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds if names else 0):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(milliseconds(runs[name], inputs, calls[name]))
    return times


def ceilings() -> dict[str, float]:
    """Measure what the card can do: copies in TB/s, fp16 matrix products in TFLOP/s."""
    block = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)  # 1 GiB
    other = torch.empty_like(block)
    side = 8192
    a = torch.randn(side, side, dtype=torch.float16, device=DEVICE)
    copies = min(milliseconds(lambda _: other.copy_(block), [a], 10) for _ in range(5))
    products = min(milliseconds(lambda x: x @ x, [a], 10) for _ in range(5))
    return {
        "copy_tb_s": 2 * block.nbytes / copies / 1e9,
        "fp16_tflop_s": 2 * side**3 / products / 1e9,
    }
