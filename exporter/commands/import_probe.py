"""The import of a module in a process of its own: a crash or a hang of it is a fault, no more."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.host import signal_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TIMEOUT = 180.0  # seconds; torch from a cold network disk takes one minute

# What else of a module must load for it to be of use
_DEEPER = {
    "cuda.bindings": ("cuda.bindings.driver", "cuda.bindings.runtime"),
    "openvino": ("msn_export.runtime.openvino",),  # imports it without its telemetry
    "tritonclient": ("tritonclient.grpc",),
}

# What a module says of itself, as an expression of ``m``
_FACTS = {
    "torch": "f'CUDA {m.version.cuda}' if m.version.cuda else 'CPU build'",
    "onnxruntime": "', '.join(m.get_available_providers())",
    "openvino": "'CPU: ' + ', '.join(m.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'))",
}

_SCRIPT = """
import importlib, json, sys
for name in sys.argv[3:]:
    importlib.import_module(name)
m = importlib.import_module(sys.argv[1])
print("\\n" + json.dumps(eval(sys.argv[2])))
"""


@dataclass(frozen=True, slots=True)
class ImportProbe:
    """The import of a module: ``fault`` is why it fails, ``fact`` what it says of itself."""

    module: str
    fault: str | None
    fact: str


def probe_all(modules: Iterable[str], workers: int) -> Mapping[str, ImportProbe]:
    """Import every module, each in a process of its own, several at a time."""
    names = sorted(set(modules))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return dict(zip(names, pool.map(probe, names), strict=True))


def probe(module: str) -> ImportProbe:
    """Import one module. A crash is a fault with its signal, a hang one with its time."""
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        "-c",
        _SCRIPT,
        module,
        _FACTS.get(module, "''"),
        *_DEEPER.get(module, ()),
    ]
    try:
        # this interpreter, and module names out of installed packages' metadata
        run = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return ImportProbe(module, f"importing it takes more than {_TIMEOUT:.0f} s", "")
    if run.returncode == 0:
        return ImportProbe(module, None, str(json.loads(run.stdout.splitlines()[-1])))
    return ImportProbe(module, _fault(run.returncode, run.stderr), "")


def _fault(code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it says nothing"
    if code < 0:
        return f"importing it ends the process ({signal_name(code)}); {last}"
    return last
