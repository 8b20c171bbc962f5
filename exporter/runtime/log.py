"""TensorRT's reports: one logger for each of its modules, and the errors of each engine.

TensorRT keeps the first logger of a process in a global. It uses that one for all later objects,
also for those that are given another, and never lets it go. So a module's logger lives as long as
the process. It is the module's own class and prints nothing: a logger written in Python takes
Python's lock for each message, also in threads of TensorRT, for which a destructor, called with
that lock, may wait. Errors come through a recorder instead, which each engine has for itself.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from msn_export.runtime.versions import IErrorRecorder, ILogger, TensorRT

_LOGGERS: dict[Any, ILogger] = {}  # by the module's class
_LOCK = threading.Lock()


def logger_of(trt: TensorRT) -> ILogger:
    """Give a module's logger, which lives as long as the process."""
    with _LOCK:
        kind = trt.Logger
        if kind not in _LOGGERS:
            _LOGGERS[kind] = kind(_nothing(trt))
        return _LOGGERS[kind]


def _nothing(trt: TensorRT) -> Any:
    """Give a severity that no message has, so that nothing is printed on stdout."""
    try:
        return trt.ILogger.Severity(-1)  # severities count up from INTERNAL_ERROR, which is 0
    except ValueError:  # an enumeration that takes its members alone
        return trt.ILogger.INTERNAL_ERROR


_KEPT = 8  # errors of an engine, the last ones


class EngineErrors:
    """The last errors of an engine, its runtime and its contexts; TensorRT reports to ``recorder``.

    The recorder must live longer than they do: they do not keep it alive.
    """

    def __init__(self, trt: TensorRT) -> None:
        self._kept: deque[tuple[int, str]] = deque(maxlen=_KEPT)  # thread, text
        self.recorder: IErrorRecorder = _make_recorder(trt, self._kept)

    def quote(self) -> str:
        """Quote and forget the errors of this thread, or where it has none, all of them.

        What a thread of TensorRT's own reports may belong to any call of the engine.
        """
        errors, here = list(self._kept), threading.get_ident()
        quoted = [one for one in errors if one[0] == here] or errors
        for one in quoted:
            if one in self._kept:  # unless more came and pushed it out
                self._kept.remove(one)
        return "; ".join(text for _, text in quoted) or "it does not say why"


def _make_recorder(trt: TensorRT, kept: deque[tuple[int, str]]) -> IErrorRecorder:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]  # the modules have no types
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def report_error(self, _code: Any, desc: str) -> bool:
            kept.append((threading.get_ident(), " ".join(desc.split())))
            return True  # it is an error: as NVIDIA's samples have it, nothing goes on

        def num_errors(self) -> int:
            return len(kept)

        def get_error_code(self, _index: int) -> Any:
            return trt.ErrorCodeTRT.UNSPECIFIED_ERROR

        def get_error_desc(self, index: int) -> str:
            errors = list(kept)
            return errors[index][1] if index < len(errors) else ""

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            kept.clear()

        get_num_errors = num_errors  # how the bindings of TensorRT 8.6 ask

    return Recorder()
