"""The compiler's process: ``python -m msn_export.engine.worker``; ``build.py`` starts it.

A job comes in as one line of JSON on stdin; events go out as lines of JSON on a pipe of their own,
because TensorRT writes to stdout and stderr as it likes (both are the raw log). After some failures
the builder stays broken in its process, others end the process: so it has one to itself. It never
outlives its parent.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msn_export.engine.compile import BuilderLog, compile_engine, make_log
from msn_export.engine.options import BuildSpec, BuildStep
from msn_export.errors import BuildError, MsnExportError
from msn_export.host import end_with, peak_rss
from msn_export.runtime.versions import row_for
from msn_export.schema import from_plain, to_plain


def main() -> None:
    """Run the job on stdin and send what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    job = json.loads(sys.stdin.readline())
    end_with(job["parent"])
    # by line, so that a crash loses nothing; names in the log may be of any alphabet
    sys.stdout.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    send = _sender(int(sys.argv[1]))
    try:
        send({"done": _run(job, send)})
    except MsnExportError as error:
        send({"failed": str(error)})
    except MemoryError:
        send({"failed": "there is not enough memory; build on a larger machine"})
    except OSError as error:
        traceback.print_exc()
        send({"os_error": [error.errno, error.strerror, error.filename]})
    except Exception as error:  # noqa: BLE001  pybind raises what it likes; the log has it all
        traceback.print_exc()
        send({"failed": f"TensorRT's Python module raised {type(error).__name__}: {error}"})


def _run(job: dict[str, Any], send: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    trt = importlib.import_module(job["module"])
    row = row_for(job["module"], trt.__version__)
    if row is None:
        raise BuildError(f"{job['module']} {trt.__version__} is not supported")
    heard = BuilderLog()
    log = make_log(trt, heard, sys.stdout)

    def report(progress: BuildStep) -> bool:
        return send({"progress": to_plain(progress)})

    spec = from_plain(BuildSpec, job["spec"], "spec")
    compiled = compile_engine(trt, row, spec, log, heard, report)
    Path(job["output"]).write_bytes(memoryview(compiled.plan))
    return {
        "version": trt.__version__,
        "kernels": to_plain(compiled.kernels),
        "notes": list(compiled.notes),
        "warnings": list(dict.fromkeys(heard.warnings)),
        "peak_rss": peak_rss(),
    }


def _sender(descriptor: int) -> Callable[[dict[str, Any]], bool]:
    """Make the function that sends an event; it is False when nobody listens any more."""
    pipe = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(event: dict[str, Any]) -> bool:
        try:
            pipe.write(json.dumps(event) + "\n")
            pipe.flush()
        except BrokenPipeError:
            return False
        return True

    return send


if __name__ == "__main__":
    main()
