"""Write docs/reliability.md: what is promised of broken input and kills, beside what was counted.

python scripts/reliability.py           runs make faults and make fuzz first: an hour
python scripts/reliability.py COUNTS    writes the page from the file of a run
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE = Path("docs/reliability.md")
TABLE = Path("docs/reliability.json")  # the counts that the page was written from
PROMISES = (
    "A command ends with 0, with 1 and one line on stderr, with 2 for wrong usage, or with 130 for "
    "Ctrl-C and SIGTERM.",
    "A file is read if it is a regular one and no larger than its kind can be. A pipe, a device, a "
    "folder or a loop of links is refused first.",
    "A graph whose loops have no constant trip count below 10,000 does not run. A graph without a "
    "manifest of ours runs in a child process, `--timeout` seconds at most.",
    "A manifest that fits neither its graph nor its own numbers is refused before memory is asked "
    "for.",
    "After a kill each output is whole. An artifact beside the manifest of another is refused with "
    "the command that makes both again, and the next run removes what was left.",
    "Where memory or address space (`ulimit -v`) does not suffice, also for an import, the exit code "
    "is 1, the last line says so, and nothing half-written is left. Nothing waits for ever.",
    "With standard output full or closed the exit code is 1, and what was written is named.",
    "Names of folders, tensors and labels are quoted where they stand in shell commands, Python, "
    "pbtxt and pages.",
)


def counts_of(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """Count cases by kind: tried, failed, hung, crashed, without a message of ours, leftovers."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        case = json.loads(line)
        counted = found[case["kind"]]
        counted["tried"] += 1
        counted["failed"] += case["code"] == 1
        counted["hung"] += case["code"] is None
        counted["crashed"] += case["code"] is not None and case["code"] < 0
        counted["unexpected"] += case["unexpected"]
        counted["left"] += case["left"]
    return {kind: dict(counted) for kind, counted in sorted(found.items())}


def page(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Write the page."""
    return "\n".join(_lines(counts)) + "\n"


def _lines(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    yield "# Reliability"
    yield ""
    yield "Written by `scripts/reliability.py` from counts of `make fuzz` and `make faults`."
    yield ""
    yield "## Promises"
    yield ""
    yield from (f"* {promise}" for promise in PROMISES)
    fuzzed = {kind: of for kind, of in counts.items() if ": " not in kind}
    killed = {kind: of for kind, of in counts.items() if kind.startswith("kill: ")}
    limited = {kind: of for kind, of in counts.items() if kind.startswith("memory: ")}
    yield ""
    yield "## Mutated files"
    yield ""
    yield (
        "A file that a command of ours wrote is changed at random, and a command that reads it "
        "runs in a process of its own."
    )
    yield ""
    yield "| file | inputs tried | hangs | crashes | errors without a message of ours | leftovers |"
    yield "|---|---|---|---|---|---|"
    for kind, of in fuzzed.items():
        cells = (of["tried"], of["hung"], of["crashed"], of["unexpected"], of["left"])
        yield f"| {kind} | {' | '.join(map(str, cells))} |"
    yield ""
    yield "## Kills"
    yield ""
    yield (
        "A command that replaces its own outputs is killed (SIGKILL) before its n-th rename, unlink "
        "or mkdir (`make faults`: for each n). Then every file must be whole, a set of which two runs wrote parts "
        "must be refused, and the next run must leave the outputs alone."
    )
    yield ""
    yield "| command | kills | leftovers after the next run |"
    yield "|---|---|---|"
    for kind, of in killed.items():
        yield f"| `{kind.removeprefix('kill: ')}` | {of['tried']} | {of['left']} |"
    yield ""
    yield "## Little memory"
    yield ""
    yield (
        "A command runs with its address space limited, from 60 MiB to 1.3 GiB. Then it "
        "must end with a result, or with exit code 1 and a last line that names memory."
    )
    yield ""
    yield "| command | limits | failed | other errors | leftovers |"
    yield "|---|---|---|---|---|"
    for kind, of in limited.items():
        cells = (
            of["tried"],
            of["failed"],
            of["hung"] + of["crashed"] + of["unexpected"],
            of["left"],
        )
        yield f"| `{kind.removeprefix('memory: ')}` | {' | '.join(map(str, cells))} |"


def main() -> None:
    if len(sys.argv) > 1:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    else:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "counts.jsonl"
            environment = {**os.environ, "RELIABILITY_COUNTS": str(file)}
            for target in ("faults", "fuzz"):
                subprocess.run(["make", target], env=environment, check=True)
            lines = file.read_text(encoding="utf-8").splitlines()
    counts = counts_of(lines)
    TABLE.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(counts), encoding="utf-8")


if __name__ == "__main__":
    main()
