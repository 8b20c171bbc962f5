"""Kills of a command before its n-th change of the file system, for ``ForkServer.run(before=)``."""

import os
import signal
from pathlib import Path
from typing import Any

CHANGES = ("rename", "replace", "unlink", "mkdir", "rmdir", "remove")
COUNT = "KILL_COUNT"  # the file that receives the number of changes
AT = "KILL_AT"  # the number of the change that is not made


def plant() -> None:
    """Count what ``os`` is asked to change, and end this process before the chosen one."""
    at, owner, made = int(os.environ[AT]), os.getpid(), [0]
    count = Path(os.environ[COUNT])

    def counted(name: str) -> None:
        given = getattr(os, name)

        def change(*arguments: Any, **options: Any) -> Any:
            if os.getpid() == owner:  # not in a child of the command
                made[0] += 1
                count.write_text(str(made[0]))
                if made[0] == at:
                    os.kill(owner, signal.SIGKILL)
            return given(*arguments, **options)

        setattr(os, name, change)

    for name in CHANGES:
        counted(name)
