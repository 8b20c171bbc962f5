"""One contender of ``graphs.py`` in a process of its own: JSON lines in, JSON lines out.

It is opened by what ``graphs.py`` sends first, and then runs batches: to show their outputs, or for
their times. It loads the packages of its own kind alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Call = Callable[[np.ndarray], np.ndarray]


def of_runner(told: dict[str, Any]) -> tuple[Call, str]:
    """Open a graph through the runtime, as users do."""
    from msn_export.runtime import open_runner

    runner = open_runner(
        told["path"],
        providers=[told["provider"]],
        threads=told["threads"],
        precision=told.get("precision"),
    )
    name = runner.outputs[0].name
    return lambda batch: runner(batch)[name], f"{runner.name}; {runner.precision or 'as typed'}"


def of_openvino(told: dict[str, Any]) -> tuple[Call, str]:
    """Compile a graph in OpenVINO with nothing around it, in fp32."""
    from msn_export.runtime.openvino import VERSION, openvino

    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "ACCURACY",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": told["threads"],
    }
    compiled = openvino.Core().compile_model(told["path"], "CPU", config)
    return lambda batch: compiled(batch)[0], f"OpenVINO {VERSION}"


def of_onnxruntime(told: dict[str, Any]) -> tuple[Call, str]:
    """Open a graph in onnxruntime with nothing around it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = told["threads"]
    session = onnxruntime.InferenceSession(
        told["path"], options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[
        0
    ], f"onnxruntime {session.get_providers()[0]}"


def of_torch(told: dict[str, Any]) -> tuple[Call, str]:
    """Load a model of transformers in PyTorch."""
    import torch
    from transformers import ViTMSNModel

    torch.set_num_threads(told["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[told["dtype"]]
    loaded = ViTMSNModel.from_pretrained(
        told["path"], attn_implementation=told["attention"], dtype=dtype
    ).eval()
    model = torch.compile(loaded) if told["compiled"] else loaded

    def call(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            hidden = model(torch.from_numpy(batch).to(dtype)).last_hidden_state
        output: np.ndarray = hidden.float().numpy()
        return output

    return call, f"torch {torch.__version__}, {told['dtype']}"


KINDS = {
    "runner": of_runner,
    "openvino": of_openvino,
    "onnxruntime": of_onnxruntime,
    "torch": of_torch,
}


def main() -> None:
    """Answer each line: the first opens, an ``outputs`` shows, a ``calls`` times."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print on stdout as they like
    told = json.loads(sys.stdin.readline())
    run, runs = KINDS[told["kind"]](told)

    def call(batch: np.ndarray) -> np.ndarray:
        output = run(batch)
        return output[:, 0] if output.ndim == 3 else output

    print(json.dumps({"runs": runs}), file=answers, flush=True)
    batch = np.empty(0, np.float32)
    for line in sys.stdin:
        asked = json.loads(line)
        if "outputs" in asked:
            batch = np.load(asked["images"])
            np.save(asked["outputs"], call(batch))
            print(json.dumps({}), file=answers, flush=True)
            continue
        call(batch)  # not counted: the caches are those of whoever ran before
        times = []
        for _ in range(asked["calls"]):
            started = time.perf_counter(), time.process_time()
            call(batch)
            ended = time.perf_counter(), time.process_time()
            times.append((1e3 * (ended[0] - started[0]), 1e3 * (ended[1] - started[1])))
        print(json.dumps({"milliseconds": times}), file=answers, flush=True)


if __name__ == "__main__":
    main()
