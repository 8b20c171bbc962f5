"""Run NVIDIA's tritonserver without docker and without a GPU, on 127.0.0.1 alone.

The wheel of nvidia-pytriton carries the server's binary and its Python backend, and no other. Our
repositories name the onnxruntime and tensorrt backends; Python-based backends of those names
(tests/data/triton_backends) stand in for them: the first runs the graph in onnxruntime, the second
runs no engine at all and only answers in the shapes that the configuration promises.

    python scripts/triton_server.py REPOSITORY [OPTION OF TRITONSERVER…]

makes the environment on its first run, starts the server and stops it at Ctrl-C.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# pytriton 0.7.0 pins numpy < 2, so it lives apart; Debian's Python has the shared libpython that
# the stub of the Python backend loads
PYTHON = "/usr/bin/python3"
PACKAGES = ("nvidia-pytriton==0.7.0", "onnxruntime==1.31.1")
ROOT = Path(__file__).absolute().parent.parent
ENVIRONMENT = Path(os.environ.get("MSN_EXPORT_TRITON", ROOT / "build/triton"))
BACKENDS = ROOT / "tests/data/triton_backends"
READY_WITHIN = 120.0  # seconds; it takes one, but two cores may be busy
STOP_WITHIN = 30.0


@dataclass(frozen=True)
class Server:
    """A running server; the ports are on 127.0.0.1."""

    pid: int
    http: int
    grpc: int
    metrics: int
    log: Path

    def get(self, path: str, *, port: int | None = None, method: str = "GET") -> tuple[int, str]:
        """Ask over HTTP; give the status and the body."""
        url = f"http://127.0.0.1:{port or self.http}/{path}"
        data = b"{}" if method == "POST" else None
        request = urllib.request.Request(url, method=method, data=data)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def environment() -> Path:
    """Make the server's environment once, about 450 MB; give its folder."""
    done = ENVIRONMENT / "installed"
    if done.is_file() and done.read_text() == "\n".join(PACKAGES):
        return ENVIRONMENT
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([PYTHON, "-m", "venv", ENVIRONMENT / "venv"], check=True)
    pip = ENVIRONMENT / "venv/bin/pip"
    subprocess.run([pip, "install", "--quiet", *PACKAGES], check=True)
    done.write_text("\n".join(PACKAGES))
    return ENVIRONMENT


def backends(folder: Path) -> Path:
    """Lay out a folder of backends: the wheel's Python one with its stub, and our two stand-ins."""
    packages = _packages()
    shipped = packages / "pytriton/tritonserver"
    shutil.copytree(shipped / "backends/python", folder / "python")
    version = packages.parent.name.removeprefix("python")
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, folder / "python")
    for stand_in in BACKENDS.iterdir():
        shutil.copytree(stand_in, folder / stand_in.name)
    return folder


def _packages() -> Path:
    (packages,) = (environment() / "venv/lib").glob("python*/site-packages")
    return packages


def free_port() -> int:
    """Find a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serve(
    repository: Path, work: Path, options: Sequence[str] = (), *, until_ready: bool = True
) -> Iterator[Server]:
    """Start tritonserver in a session of its own, and stop it by its pid at the end.

    Args:
        repository: the model repository.
        work: a folder for its backends and its log.
        options: more of its command line.
        until_ready: wait until every model is ready; False waits until the server lives.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """
    packages = _packages()
    folder = work / "backends"
    if not folder.is_dir():
        backends(folder)
    log = work / "tritonserver.log"
    http, grpc, metrics = free_port(), free_port(), free_port()
    command = [
        str(packages / "pytriton/tritonserver/bin/tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={folder}",
        f"--cache-directory={packages / 'pytriton/tritonserver/caches'}",
        "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1", f"--metrics-port={metrics}",
        "--disable-auto-complete-config",
        *options,
    ]  # fmt: skip
    variables = {
        "PATH": f"{environment() / 'venv/bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "HOME": os.environ.get("HOME", "/"),
    }
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=variables, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, cwd=work,
        )  # fmt: skip
    server = Server(child.pid, http, grpc, metrics, log)
    try:
        _wait(server, child, "ready" if until_ready else "live")
        yield server
    finally:
        stop(child)


def _wait(server: Server, child: "subprocess.Popen[bytes]", state: str) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if child.poll() is not None:
            break
        with contextlib.suppress(OSError):
            if server.get(f"v2/health/{state}")[0] == 200:
                return
        time.sleep(0.1)
    tail = server.log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"tritonserver is not {state} (exit {child.poll()}):\n{tail}")


def stop(child: "subprocess.Popen[bytes]") -> int:
    """Interrupt the server and wait; kill it and its session if it does not end. Give its code."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            return child.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait(STOP_WITHIN)


def main() -> int:
    """Serve a repository until Ctrl-C."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    repository = Path(sys.argv[1]).absolute()
    work = environment() / "by-hand"
    work.mkdir(exist_ok=True)
    with serve(repository, work, sys.argv[2:]) as server, contextlib.suppress(KeyboardInterrupt):
        print(
            f"http 127.0.0.1:{server.http}, grpc 127.0.0.1:{server.grpc}, metrics {server.metrics}"
        )
        print(f"log {server.log}, pid {server.pid}; Ctrl-C stops it")
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
