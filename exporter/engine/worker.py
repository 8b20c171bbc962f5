"""The compiler's process: ``python -m msn_export.engine.worker``; ``build.py`` starts it.

It sends events before its answer, and what TensorRT writes to stdout and stderr is the raw log.
After some failures the builder stays broken in its process, others end the process: so it has one
to itself.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from msn_export.engine.compile import BuilderLog, compile_engine, make_log
from msn_export.engine.options import BuildSpec, BuildStep
from msn_export.errors import BuildError
from msn_export.host import Send, peak_rss, serve
from msn_export.runtime.versions import row_for
from msn_export.schema import from_plain, to_plain


def main() -> None:
    # by line, so that a crash loses nothing; names in the log may be of any alphabet
    sys.stdout.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    serve(_run, _failure)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        return {"failed": "there is not enough memory; build on a larger machine"}
    if isinstance(error, OSError):
        return {"os_error": [error.errno, error.strerror, error.filename]}
    return {"failed": f"TensorRT's Python module raised {type(error).__name__}: {error}"}


def _run(job: dict[str, Any], send: Send) -> dict[str, Any]:
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


if __name__ == "__main__":
    main()
