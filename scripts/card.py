"""Run what needs an NVIDIA card so that a crash or a hang costs one test, and the time is kept.

    python scripts/card.py --output results [--seconds 420]      # what a card is asked first
    python scripts/card.py --output results --suite [--seconds 3600]   # every test of a card

Four phases in this order, each with its own limit: the canary (an engine is opened twice and gives its golden
values), the runner's state machine, vit-msn-small in fp16, the benchmark of vit-msn-base at batches 1, 8 and 64.
A phase is a process. One that crashes is begun again behind the test that ended it; a test that takes longer than
its group may (tests/contracts/on_a_card.py) is killed and written down as one that hung. Where the canary dies
nothing of TensorRT begins. Results are written as they come: results.jsonl, gpu.json, log.txt.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.contracts.on_a_card import (  # noqa: E402  where the tree is
    CANARY,
    DEADLINE,
    ended_in,
    lines_of,
    seconds_of,
    write,
)

SUITE = ("tests/gpu", "tests/runtime/test_tensorrt.py", "tests/runtime/test_tensorrt_lifetime.py")
START = (
    90  # seconds in which a session must begin its first test: it imports torch and transformers
)
LOOK = 0.2  # seconds between two looks at a session


@dataclass(frozen=True)
class Phase:
    """Tests to run, and the seconds they may take together."""

    name: str
    tests: tuple[str, ...]
    seconds: float
    needs_canary: bool = True


PHASES = (
    Phase("canary", ("tests/gpu/test_gpu_canary.py",), 60, needs_canary=False),
    Phase("state machine", ("tests/runtime/test_tensorrt.py", "tests/runtime/test_tensorrt_lifetime.py"), 150),
    Phase("vit-msn-small in fp16", ("tests/gpu/test_gpu_engines.py", "-k", "vit-msn-small and fp16"), 150),
)  # fmt: skip


def run_tests(
    tests: tuple[str, ...], folder: Path, until: float, options: tuple[str, ...] = ()
) -> None:
    """Run tests of a card until all have ended or the time is over; one that kills is left behind."""
    results = folder / "results.jsonl"
    while time.time() < until:
        before = len(ended_in(results))
        reason = watch(tests, options, folder, until)
        if not reason:
            return
        begun = begun_last(results)
        if begun is not None:
            write(results, {"test": begun, "when": "call", "outcome": "failed", "why": reason})
        if len(ended_in(results)) == before:  # it does not even collect: again would be the same
            print(f"{' '.join(tests)}: {reason}; log.txt has what it printed", file=sys.stderr)
            return


def watch(tests: tuple[str, ...], options: tuple[str, ...], folder: Path, until: float) -> str:
    """Run one session of pytest; give why it did not come to its end, empty where it did."""
    results = folder / "results.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
               "--results", str(results.absolute()), *options, *tests]  # fmt: skip
    environment = {**os.environ, DEADLINE: str(min(until, float(os.environ.get(DEADLINE, "inf"))))}
    with (folder / "log.txt").open("ab") as log:
        session = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        since, current = time.time(), None
        while session.poll() is None:
            time.sleep(LOOK)
            begun, now = begun_last(results), time.time()
            if begun != current:
                since, current = now, begun
            allowed = START if current is None else seconds_of(current)
            if now - since > allowed or now > until + LOOK:
                os.killpg(session.pid, signal.SIGKILL)  # what hangs in a driver hears nothing else
                session.wait()
                if now > until + LOOK:
                    return f"killed after {now - since:.0f} s: the time of its phase was over"
                return f"killed after {now - since:.0f} s: it hung (its group has {allowed:g} s)"
    if session.returncode < 0:
        return f"ended by {signal.Signals(-session.returncode).name}"
    # 0 and 1: all ran; 5: none was left; anything else is no end of pytest's
    ended = session.returncode in {0, 1, 5} and begun_last(results) is None
    return "" if ended else f"ended with exit code {session.returncode}"


def begun_last(results: Path) -> str | None:
    """Name the test that has begun and not ended."""
    ended = ended_in(results)
    begun = [line["test"] for line in lines_of(results) if "begun" in line]
    return begun[-1] if begun and begun[-1] not in ended else None


def died(results: Path) -> str:
    """Say why the canary did not pass; empty where it did."""
    found = [
        line
        for line in lines_of(results)
        if "test_gpu_canary" in line["test"] and "outcome" in line
    ]
    bad = [line for line in found if line["outcome"] != "passed"]
    if not found:
        return "the canary did not run"
    return f"the canary {bad[0]['outcome']}: {bad[0]['why'][-200:]}" if bad else ""


def first(folder: Path, until: float) -> None:
    """Run the phases in their order, and the benchmark in what is left of the time."""
    for phase in PHASES:
        end = min(until, time.time() + phase.seconds)
        print(f"{phase.name}: up to {end - time.time():.0f} s", flush=True)
        run_tests(phase.tests, folder, end)
        if not phase.needs_canary:
            os.environ[CANARY] = died(folder / "results.jsonl")
            if os.environ[CANARY]:
                print(os.environ[CANARY], flush=True)
    left = until - time.time()
    if left < LOOK:
        print("benchmark: not begun, the time is over")
        return
    photographs = folder / "photographs"
    subprocess.run(
        [sys.executable, "scripts/photographs.py", str(photographs)], cwd=ROOT, check=True
    )
    command = [sys.executable, "benchmarks/gpu.py", "--images", str(photographs), "--models", "random:vit-msn-base:0",
               "--budget", f"{max(left - 30, 0):.0f}", "--output", str(folder / "gpu.json")]  # fmt: skip
    print(f"benchmark: up to {left:.0f} s", flush=True)
    with (folder / "log.txt").open("ab") as log:
        session = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            session.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(session.pid, signal.SIGKILL)
            session.wait()
            print("benchmark: killed, the time is over; gpu.json has what was measured", flush=True)


def main(arguments: list[str]) -> None:
    """Run, and print how many tests ended how."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for what is written")
    parser.add_argument("--seconds", type=float, default=420, help="of everything together")
    parser.add_argument(
        "--suite", action="store_true", help="every test of a card, not the first alone"
    )
    asked = parser.parse_args(arguments)
    folder = asked.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MSN_EXPORT_CARD_FOLDER"] = str(folder / "built")  # a build outlives its process
    until = time.time() + asked.seconds
    if asked.suite:
        run_tests(PHASES[0].tests, folder, until)
        os.environ[CANARY] = died(folder / "results.jsonl")
        run_tests(SUITE, folder, until)
    else:
        first(folder, until)
    outcomes = [line["outcome"] for line in lines_of(folder / "results.jsonl") if "outcome" in line]
    print(
        ", ".join(f"{outcomes.count(one)} {one}" for one in sorted(set(outcomes)))
        or "no test ended"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
