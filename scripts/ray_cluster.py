"""Run commands that start Ray, in an environment of their own and out of the network's reach.

Ray adds 420 MB to what the tests need, so it lies apart: an environment that sees the packages of
this one, and Ray. Its control plane listens on every interface, whatever address it is given; so
the commands run in a network namespace that has nothing but its loopback.

    python scripts/ray_cluster.py -m msn_export embed MODEL IMAGES -o OUT.parquet --ray local

makes the environment on its first run and hands its Python the arguments.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
ENVIRONMENT = Path(os.environ.get("MSN_EXPORT_RAY", ROOT / "build/ray"))
PACKAGE = "ray[data,serve]>=2.60,<3"
CONSTRAINTS = ROOT / "constraints.txt"
# Brings the loopback up (SIOCSIFFLAGS, IFF_UP), as "ip link set lo up" does, and becomes the command
LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as any:
    fcntl.ioctl(any, 0x8914, struct.pack("16sh22x", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def environment() -> Path:
    """Make the environment once; give its Python."""
    python = ENVIRONMENT / "venv/bin/python"
    ours = sysconfig.get_path("purelib")
    wanted = f"{PACKAGE}\n{ours}\n{CONSTRAINTS.read_text()}"
    done = ENVIRONMENT / "installed"
    if done.is_file() and done.read_text() == wanted:
        return python
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    # with this interpreter: what is compiled in the packages seen has to fit
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", ENVIRONMENT / "venv"], check=True
    )
    (packages,) = (ENVIRONMENT / "venv/lib").glob("python*/site-packages")
    # a folder of packages, not a line of a path file: its own path files count, the editable
    # install's among them
    (packages / "development.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, PACKAGE]
    subprocess.run(install, check=True)
    done.write_text(wanted)
    return python


def alone(command: Sequence[object]) -> list[str]:
    """Put a command where nothing but its own loopback can be reached, from either side."""
    unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return [*unshare, sys.executable, "-c", LOOPBACK, *map(str, command)]


@contextlib.contextmanager
def started(arguments: Sequence[object], **options: object) -> Iterator["subprocess.Popen[str]"]:
    """Start the environment's Python; end it, and all it started, when the context ends.

    Args:
        arguments: of Python.
        options: more of ``subprocess.Popen``.
    """
    # the sessions' folder: sockets in it allow no long path, and an address that a killed cluster
    # left in it would be joined by the next command
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as tmp:
        # a cluster's first start writes a token into the home folder
        own = {"RAY_TMPDIR": tmp, "HOME": tmp, "RAY_USAGE_STATS_ENABLED": "0"}
        variables = {**os.environ, **own}
        child = subprocess.Popen(
            alone([environment(), *arguments]),
            env=variables, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **options,
        )  # fmt: skip
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            _end_orphans(tmp)


def _end_orphans(session: str) -> None:
    """End what Ray's own processes left: they are in sessions of their own, but know its folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            variables = (entry / "environ").read_bytes()
            if f"RAY_TMPDIR={session}".encode() in variables.split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def main() -> int:
    """Run Python with the arguments that were given; give its exit code."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child on its way out
    with started(sys.argv[1:]) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGINT)
            return child.wait()


if __name__ == "__main__":
    sys.exit(main())
