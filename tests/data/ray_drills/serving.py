"""The service under load, as ``serve run`` starts it; one of two replicas is killed in the middle.

    python serving.py TOLD MODEL PICTURE…

Eight clients post each picture twice, and once more what was not answered. TOLD gets, as JSON, what
they were answered and which replicas there were.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOLD, MODEL, PICTURES = Path(sys.argv[1]), sys.argv[2], [Path(name) for name in sys.argv[3:]]
URL = "http://127.0.0.1:8000/"
CLIENTS, TIMES, TRIES = 8, 2, 2


def ask(content: bytes | None = None) -> tuple[int, dict]:
    """Ask the service; the status is 0 where the connection ended without an answer."""
    try:
        with urllib.request.urlopen(URL, content, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        return error.code, json.loads(body) if body.startswith("{") else {"error": body}
    except OSError as error:
        return 0, {"error": repr(error)}


def replicas() -> set[int]:
    """Find the replicas' processes by the titles that Ray gives them."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title, variables = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        session = f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}".encode()
        if title.startswith(b"ray::ServeReplica") and session in variables.split(b"\0"):
            found.add(int(entry.name))
    return found


def wait_until(condition, run: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if run.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"serve ended with {run.poll()}, or nothing came in {seconds} s")
        time.sleep(0.1)


def drill(run: subprocess.Popen) -> dict:
    wait_until(lambda: ask()[0] == 200 and len(replicas()) == 2, run)
    about, before = ask()[1], replicas()
    victim, answered = min(before), itertools.count()
    half = len(PICTURES) * TIMES // 2
    killed = threading.Event()

    def client(path: Path) -> dict:
        tries, status = 0, 0
        while tries < TRIES and status not in {200, 400}:
            tries += 1
            status, answer = ask(path.read_bytes())
        if next(answered) == half:
            os.kill(victim, signal.SIGKILL)
            killed.set()
        after = killed.is_set()
        return {"name": path.name, "tries": tries, "after": after, "status": status, **answer}

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, PICTURES * TIMES))
    wait_until(lambda: len(replicas() - {victim}) == 2, run)
    return {"about": about, "before": sorted(before), "victim": victim,
            "after": sorted(replicas()), "answers": answers}  # fmt: skip


def main() -> int:
    command = [Path(sys.executable).with_name("serve"), "run", "msn_export.cluster.serve:app",
               f"model={MODEL}", "replicas=2", "wait=20"]  # fmt: skip
    with subprocess.Popen(command, stdout=sys.stderr) as run:
        try:
            told = drill(run)
        finally:
            run.send_signal(signal.SIGINT)
            told_to_end = time.monotonic()
            try:
                run.wait(60)
            except subprocess.TimeoutExpired:
                run.kill()
    told["seconds_to_stop"] = time.monotonic() - told_to_end
    told["left"] = sorted(replicas())
    TOLD.write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
