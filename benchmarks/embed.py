"""Memory and resumption of ``msn-export embed`` over thousands of photographs.

    python benchmarks/embed.py MODEL.onnx photographs/ [--count 5000] [--output out.npy]

Copies of the photographs, one in a hundred cut short, go through the model twice: in one go, with
the resident memory of the process and of its decoders read twice a second; and killed (SIGKILL) in
the middle, then resumed. The two files must be the same bytes. Writes
benchmarks/results/embed.json and prints the table of docs/embed.md.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msn_export.host import rss, this_machine
from msn_export.manifest import sha256_of

RESULTS = Path(__file__).parent / "results" / "embed.json"


def make_folder(photographs: Path, folder: Path, count: int) -> int:
    """Fill a folder with copies; give how many are broken."""
    sources = sorted(path for path in photographs.iterdir() if path.is_file())
    broken = 0
    for number in range(count):
        source = sources[number % len(sources)]
        target = folder / f"{number // 500:02}" / f"{number:05}{source.suffix}"
        target.parent.mkdir(exist_ok=True)
        content = source.read_bytes()
        if number % 100 == 37:
            content = content[: len(content) // 3]
            broken += 1
        target.write_bytes(content)
    return broken


def start(model: Path, folder: Path, output: Path, *options: str) -> "subprocess.Popen[str]":
    """Start the command."""
    command = [sys.executable, "-m", "msn_export", "embed", model, folder, "-o", output]
    return subprocess.Popen([*command, "--json", *options], stdout=subprocess.PIPE, text=True)


def rows_done(output: Path) -> int:
    """Read how far a run is from its journal."""
    journal = output.with_name(output.name + ".parts") / "parts.jsonl"
    try:
        lines = journal.read_text().splitlines()
        return int(json.loads(lines[-1]).get("done", 0)) if lines else 0
    except (OSError, ValueError):
        return 0


def watch(run: "subprocess.Popen[str]", output: Path) -> list[dict[str, float]]:
    """Read the memory of a run and of its decoders until it ends."""
    began, seen = time.monotonic(), []
    while run.poll() is None:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        decoders = children.read_text().split() if children.exists() else []
        seen.append(
            {
                "seconds": round(time.monotonic() - began, 1),
                "done": rows_done(output),
                "rss": rss(run.pid),
                "decoders": sum(rss(int(child)) for child in decoders),
            }
        )
        time.sleep(0.5)
    # in its last moments the journal is gone and memory is given back
    return [at for at in seen if at["decoders"] and (at["done"] or at["seconds"] < 20)]


def in_one_go(model: Path, folder: Path, output: Path) -> dict[str, Any]:
    """Run it whole; give what it says and what it weighed."""
    run = start(model, folder, output)
    seen = watch(run, output)
    assert run.stdout is not None
    told = json.loads(run.stdout.read())
    if run.returncode != 0:
        raise SystemExit(f"embed failed ({run.returncode})")
    return {"told": told, "seen": seen}


def killed_and_resumed(model: Path, folder: Path, output: Path, count: int) -> dict[str, Any]:
    """Kill it in the middle, resume it; give where it was and what it did."""
    run, place = start(model, folder, output), 2 * count // 5
    while rows_done(output) < place:
        if run.poll() is not None:
            raise SystemExit("embed was over before it could be killed")
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    resumed = start(model, folder, output, "--resume")
    out, _ = resumed.communicate()
    if resumed.returncode != 0:
        raise SystemExit(f"embed --resume failed ({resumed.returncode})")
    told = json.loads(out)
    return {"killed_past": place, "resumed_at": told["resumed_at"], "seconds": told["seconds"]}


def table(seen: list[dict[str, float]], count: int) -> str:
    """Show the memory at each tenth of the run."""
    lines = ["| rows done | s | process, MB | decoders, MB |", "|---|---|---|---|"]
    for tenth in range(1, 11):
        at = next((s for s in seen if s["done"] >= count * tenth // 10), seen[-1])
        lines.append(
            f"| {at['done']:.0f} | {at['seconds']:.0f} | {at['rss'] / 1e6:.0f} "
            f"| {at['decoders'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run both, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--ending", choices=["npy", "parquet"], default="npy")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        broken = make_folder(given.photographs, folder, given.count)
        whole, halves = (Path(scratch) / f"{name}.{given.ending}" for name in ("whole", "halves"))
        first = in_one_go(given.model, folder, whole)
        second = killed_and_resumed(given.model, folder, halves, given.count)
        same = sha256_of(whole) == sha256_of(halves)
    seen, told = first["seen"], first["told"]
    settled = [at for at in seen if at["done"] >= given.count // 10]
    result = {
        "model": given.model.name,
        "count": given.count,
        "broken": broken,
        "broken_told": told["broken"],
        "machine": str(this_machine()),
        "images_per_second": told["images_per_second"],
        "seconds": told["seconds"],
        "peak_rss_bytes": told["peak_rss_bytes"],
        "growth_bytes": settled[-1]["rss"] - settled[0]["rss"],
        "spread_bytes": max(s["rss"] for s in settled) - min(s["rss"] for s in settled),
        "resumed": second,
        "same_bytes": same,
        "seen": seen[:: max(1, len(seen) // 50)],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(seen, given.count))
    print(json.dumps({k: v for k, v in result.items() if k != "seen"}, indent=1))
    if not same or told["broken"] != broken:
        raise SystemExit("the resumed file differs, or pictures were miscounted")


if __name__ == "__main__":
    main()
