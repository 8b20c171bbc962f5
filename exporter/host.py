"""This machine, its NVIDIA driver, and processes on it: their memory, and children that answer.

Constructing ``trt.Runtime`` (or, in full TensorRT, ``trt.Builder``) where no driver is found ends
the process, so every path that would do so asks here first. The driver API works with any driver
version; the CUDA runtime library is not needed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeAlias

from msn_export.errors import MsnExportError, RunnerError
from msn_export.spec import ComputeCapability

# CUDA driver API, cuda.h: CUdevice_attribute
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR = 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
_NO_DEVICE = 100  # CUresult CUDA_ERROR_NO_DEVICE: cuInit says so where all devices are hidden
_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU; ``memory`` in bytes."""

    index: int
    name: str
    capability: ComputeCapability
    memory: int


@dataclass(frozen=True, slots=True)
class Driver:
    """A working driver; ``cuda`` is the newest CUDA it knows, such as ``13.0``."""

    cuda: str
    devices: tuple[Device, ...]

    def require_index(self, device: int) -> None:
        if not 0 <= device < len(self.devices):
            names = ", ".join(f"{one.index}: {one.name}" for one in self.devices)
            raise RunnerError(f"device {device} does not exist; here are {names}")


@dataclass(frozen=True, slots=True)
class NoDriver:
    """The reason why no GPU can be used here, as the end of a sentence."""

    reason: str


class _CallError(Exception):
    """A driver call gave an error code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def find_driver(library: str = _LIBRARY) -> Driver | NoDriver:
    """Find the driver and its devices; a driver that sees no device counts as none."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return NoDriver(f"no NVIDIA driver ({library} cannot be loaded)")
    try:
        _call(cuda, "cuInit", 0)
        devices = tuple(_device(cuda, index) for index in range(_number(cuda, "cuDeviceGetCount")))
        version = _number(cuda, "cuDriverGetVersion")
    except _CallError as error:
        if error.code == _NO_DEVICE:
            return _no_device()
        return NoDriver(f"the NVIDIA driver does not work ({error})")
    except AttributeError as error:  # a library without the driver's functions
        return NoDriver(f"the NVIDIA driver does not work ({error})")
    if not devices:
        return _no_device()
    return Driver(f"{version // 1000}.{version % 1000 // 10}", devices)


def _no_device() -> NoDriver:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
    return NoDriver(f"the NVIDIA driver sees no GPU{hint}")


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle = _number(cuda, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetName", name, len(name), handle)
    memory = ctypes.c_size_t()
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    major, minor = (
        _number(cuda, "cuDeviceGetAttribute", attribute, handle) for attribute in (_MAJOR, _MINOR)
    )
    text = name.value.decode("utf-8", "replace")
    return Device(index, text, ComputeCapability(major, minor), memory.value)


def _number(cuda: ctypes.CDLL, function: str, *arguments: int) -> int:
    """Call a function whose first parameter receives an int."""
    value = ctypes.c_int()
    _call(cuda, function, ctypes.byref(value), *arguments)
    return value.value


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    call: Callable[..., int] = getattr(cuda, function)
    code = call(*arguments)
    if code != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        name = text.value.decode() if text.value else "unknown"
        raise _CallError(f"{function}: {name}, error {code}", code)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def peak_rss(process: int | str = "self") -> int:
    """Read a process' highest resident memory so far, in bytes; 0 where it cannot be read.

    Not ``getrusage``: its figure is inherited from the parent at the start.
    """
    return _field("VmHWM:", process)


def rss(process: int | str = "self") -> int:
    """Read a process' resident memory now, in bytes; 0 where it cannot be read."""
    return _field("VmRSS:", process)


def address_space_used(process: int | str = "self") -> int:
    """Read a process' address space, in bytes; 0 where it cannot be read."""
    return _field("VmSize:", process)


def reset_peak() -> None:
    """Let the peak of this process start again from what it holds now, where that is allowed."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def _field(name: str, process: int | str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(name)), None)
    return int(found.split()[1]) * 1024 if found else 0


def address_space_limit() -> int | None:
    """Give the bytes of address space that this process may have (``ulimit -v``), None for all."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def ticks(process: int) -> tuple[int, int]:
    """Read what a process has used of processors, as a user and as the system; 0 once it ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        user, system = fields.rpartition(")")[2].split()[11:13]  # proc_pid_stat(5)
    except (OSError, ValueError):
        return 0, 0
    return int(user), int(system)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def signal_name(code: int) -> str:
    """Name the signal behind a negative exit code; Python has no name for most real-time ones."""
    return next((one.name for one in signal.Signals if one == -code), f"signal {-code}")


_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor, usable cores, memory in bytes, system, and GPUs by name.

    ``instructions`` are those of the processor that decide how fast products are.
    """

    cpu: str
    cores: int
    threads_per_core: int
    memory: int
    system: str
    python: str
    gpus: tuple[str, ...] = ()
    cuda: str | None = None
    driver: str | None = None
    instructions: tuple[str, ...] = ()

    def __str__(self) -> str:
        instructions = f" ({', '.join(self.instructions)})" if self.instructions else ""
        gpus = f", {', '.join(self.gpus)}" if self.gpus else ""
        return (
            f"{self.cores} cores of {self.cpu}{instructions}, {self.memory / 2**30:.0f} GiB{gpus}"
        )


def this_machine() -> Machine:
    """Describe this machine as far as this process may use it."""
    driver = find_driver()
    devices = driver.devices if isinstance(driver, Driver) else ()
    logical = usable_cores()
    return Machine(
        cpu=_cpu(),
        cores=physical_cores(),
        threads_per_core=max(1, round(len(logical) / physical_cores())),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=platform.platform(),
        python=platform.python_version(),
        gpus=tuple(
            f"{device.name} (SM {device.capability}, {device.memory / 2**30:.0f} GiB)"
            for device in devices
        ),
        cuda=driver.cuda if isinstance(driver, Driver) else None,
        driver=driver_release(),
        instructions=_instructions(),
    )


def usable_cores() -> frozenset[int]:
    """List the logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Count the cores behind ``usable_cores``: two threads of one core count once."""
    siblings = set()
    for core in usable_cores():
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text(encoding="ascii"))
        except OSError:
            siblings.add(str(core))
    return len(siblings)


_OF_INPUT = 8  # a ViT-S takes eleven times its input's memory while it runs, larger ones more


def require_memory(name: str, batch: int, image: Sequence[int | str], item: int) -> None:
    """Refuse a batch that a model would take no smaller, and that does not fit into memory.

    Args:
        name: of the model, for the message.
        batch: its smallest.
        image: sizes of one image.
        item: bytes of one number.
    """
    size = batch * item * math.prod(one for one in image if isinstance(one, int))
    free = available_memory()
    if _OF_INPUT * size > free:
        raise RunnerError(
            f"{name} takes batches of {batch:,} images alone, whose input is {size / 2**30:.1f} "
            f"GiB and {_OF_INPUT} times that while it runs; {free / 2**30:.1f} GiB are free: "
            "export it with a smaller or a dynamic batch"
        )


def available_memory() -> int:
    """Bytes that can be had without swapping: the system's, or what a container may still take."""
    return min((_of_system(), *_of_cgroup()))


def _of_system() -> int:
    """MemAvailable of proc(5), else free pages."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Limit, use, and in memory.stat what the kernel gives back under pressure: version 2, version 1
# (docs.kernel.org, admin-guide, cgroup-v2 and cgroup-v1/memory). A container sees its own here.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _of_cgroup() -> Iterator[int]:
    """The system's figures are those of the whole machine, even in a container with a limit."""
    for folder, limit, used, cached in _CGROUPS:
        most, now = (_limit_in(_lines(Path(folder, name))) for name in (limit, used))
        if most is None or now is None:
            continue
        counted = (line.partition(" ") for line in _lines(Path(folder, "memory.stat")))
        back = next((number for name, _, number in counted if name == cached), "0")
        yield max(0, most - now + int(back))


def _limit_in(lines: list[str]) -> int | None:
    """Read a file of one number; ``max`` means that there is no limit."""
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:  # another system, another kernel, no right to see it
        return []


def driver_release(path: Path = _NVIDIA) -> str | None:
    """Read the release of the NVIDIA driver, such as 580.95.05; None where it does not say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", text)
    return found[1] if found else None


def _cpu() -> str:
    return _of_cpu("model name") or platform.processor() or platform.machine()


# Flags of Linux for x86 and Arm (proc(5)): vectors, and products of bf16 and int8
_FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def _instructions() -> tuple[str, ...]:
    flags = {*_of_cpu("flags").split(), *_of_cpu("Features").split()}
    return tuple(flag for flag in _FLAGS if flag in flags)


def _of_cpu(name: str) -> str:
    """Read what the first processor's line of a name says; nothing where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((text.strip() for key, _, text in pairs if key.strip() == name), "")


_TIMEOUT = 20.0  # seconds


def device_bytes(process: int) -> int | None:
    """Ask the driver's own tool; None where it is missing or cannot tell processes apart."""
    import shutil  # the three are half of what importing this module would take
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        # a fixed query to the tool that comes with the driver
        run = subprocess.run(  # noqa: S603
            [tool, *query], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in run.stdout.splitlines():
        owner, _, used = (part.strip() for part in line.partition(","))
        if owner == str(process) and used.isdigit():
            return int(used) * 2**20
    return None


_TAIL = 4096  # bytes of a log that are searched for its last line


class ChildProcess:
    """``python -m module PIPE``; on the way out of its ``with`` it is dead, whatever happened.

    Messages to it are lines of JSON on its stdin, those it sends lines of JSON on a pipe of their
    own, for libraries print on stdout and stderr as they like. Its main function calls ``serve``.

    Args:
        module: what runs.
        log: receives all that it and its libraries print.
        environment: instead of this process' own.
    """

    def __init__(
        self, module: str, log: IO[bytes], environment: Mapping[str, str] | None = None
    ) -> None:
        import subprocess

        reading, writing = os.pipe()
        self.messages = os.fdopen(reading, "rb")
        try:
            # this interpreter and a module of this package; what it works on travels on stdin
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", module, str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the child
            )
        except BaseException:
            self.messages.close()
            raise
        finally:
            os.close(writing)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message and this process' number; a child that is dead takes none."""
        assert self.process.stdin is not None
        line = json.dumps({**message, "parent": os.getpid()}).encode() + b"\n"
        with suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        with suppress(BrokenPipeError):  # bytes of a message that was not read
            self.process.communicate()
        self.messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def last_line(log: IO[bytes]) -> str:
    """Give the last line of a log, 200 characters of it at most."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _TAIL))
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


Send: TypeAlias = Callable[[dict[str, Any]], bool]


def serve(
    answer: Callable[[dict[str, Any], Send], Any], failure: Callable[[Exception], dict[str, Any]]
) -> None:
    """Be a ``ChildProcess``: answer each message on stdin until there are no more.

    What ``answer`` returns goes back as ``{"done": …}``, an error of ours as ``{"failed": …}``. It
    never outlives its parent.

    Args:
        answer: is given a message and ``send``, which sends others before the answer and is False
            when nobody listens any more.
        failure: the message for any other error; the log has its traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    pipe = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")

    def send(message: dict[str, Any]) -> bool:
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except BrokenPipeError:
            return False
        return True

    for line in sys.stdin:
        message = json.loads(line)
        end_with(message["parent"])
        try:
            send({"done": answer(message, send)})
        except MsnExportError as error:
            send({"failed": str(error)})
        except Exception as error:  # noqa: BLE001  libraries raise what they like
            if not isinstance(error, MemoryError):
                import traceback

                traceback.print_exc()
            send(failure(error))
