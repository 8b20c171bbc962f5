"""Which Triton Inference Server container ships which TensorRT and which onnxruntime.

An engine loads only in the TensorRT that built it, so it needs the container that ships that one.

Sources, one row a container ``nvcr.io/nvidia/tritonserver:XX.YY-py3``:

* TensorRT: docs.nvidia.com/deeplearning/triton-inference-server/release-notes/rel-26-04.html, table
  "NVIDIA Triton Inference Server Container Versions" (newest rows from rel-26-05.html). A row is
  None where that table is silent (25.07, 26.06 on) or contradicts another page of NVIDIA's (24.12:
  10.6 there, 10.7 in the compatibility matrix). The ``-trtllm-python-py3`` images ship others.
* onnxruntime: triton-inference-server/server, docs/introduction/compatibility.md, table
  "ONNX Runtime Versions".
"""

import re
from dataclasses import dataclass

from msn_export.errors import SpecError


@dataclass(frozen=True, slots=True)
class Release:
    """One container; a version is None where no source tells it."""

    name: str
    tensorrt: str | None
    onnxruntime: str | None

    @property
    def image(self) -> str:
        """The image that ``docker run`` takes."""
        return f"nvcr.io/nvidia/tritonserver:{self.name}-py3"


RELEASES = tuple(
    Release(*row)
    for row in (
        ("26.07", None, "1.27.0"),
        ("26.06", None, "1.24.4"),
        ("26.05", "10.16.1.11", "1.24.4"),
        ("26.04", "10.16.1.11", "1.24.4"),
        ("26.03", "10.16.0.72", "1.24.2"),
        ("26.02", "10.15.1.29", "1.24.1"),
        ("26.01", "10.14.1.48", "1.23.2"),
        ("25.12", "10.14.1.48", "1.23.2"),
        ("25.11", "10.14.1.48", "1.23.2"),
        ("25.10", "10.13.3.9", "1.23.1"),
        ("25.09", "10.13.3.9", "1.23.0"),
        ("25.08", "10.13.2.6", "1.23.0"),
        ("25.07", None, "1.22.0"),
        ("25.06", "10.11.0.33", "1.22.0"),
        ("25.05", "10.10.0.31", "1.22.0"),
        ("25.04", "10.9.0.34", "1.21.0"),
        ("25.03", "10.9.0.34", "1.21.0"),
        ("25.02", "10.8.0.43", "1.20.1"),
        ("25.01", "10.8.0.43", "1.20.1"),
        ("24.12", None, "1.20.1"),
        ("24.11", "10.6.0.26", "1.19.2"),
        ("24.10", "10.5.0.18", "1.19.2"),
        ("24.09", "10.4.0.26", "1.19.2"),
        ("24.08", "10.3.0.26", "1.18.1"),
        ("24.07", "10.2.0.19", "1.18.1"),
        ("24.06", "10.1.0.27", "1.18.0"),
        ("24.05", "10.0.1.6", "1.18.0"),
        ("24.04", "8.6.3", "1.17.3"),
    )
)
# microsoft/onnxruntime pull request 25156 (label release:1.23.0) brought Attention's CPU kernel;
# 27542 (March 2026, after 1.24) today's CUDA kernels: before it a GPU may run Attention on the CPU.
ATTENTION_OPSET = 23
ATTENTION_SINCE = (1, 23)
ATTENTION_CUDA_SINCE = (1, 25)


def parse_release(text: str) -> Release:
    """Read a release's name, ``YY.MM``; one that is not in the table ships what nobody told us.

    Raises:
        SpecError: it is no such name.
    """
    if re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", text) is None:
        raise SpecError(f"Triton release {text!r} is no release; expected YY.MM, as in 25.10")
    known = (release for release in RELEASES if release.name == text)
    return next(known, Release(text, None, None))


def for_tensorrt(version: str) -> Release:
    """Choose the newest release that ships a TensorRT.

    Raises:
        SpecError: none is known to; the message names the nearest ones.
    """
    found = [release for release in RELEASES if same_tensorrt(release.tensorrt, version)]
    if found:
        return found[0]
    known = [release for release in RELEASES if release.tensorrt]
    below = [r for r in known if numbers(r.tensorrt) < numbers(version)]
    above = [r for r in known if numbers(r.tensorrt) > numbers(version)]
    nearest = [*above[-1:], *below[:1]]
    told = " and ".join(f"{release.name} ships {release.tensorrt}" for release in nearest)
    raise SpecError(
        f"no Triton release is known to ship TensorRT {version} ({told}); build the engine with "
        "one of those, or name your release with --release YY.MM"
    )


def for_onnx(opset: int) -> Release:
    """Choose the release for a graph of an opset: the newest, whose onnxruntime knows the most."""
    return next(release for release in RELEASES if runs_opset(release, opset) is not False)


def runs_opset(release: Release, opset: int) -> bool | None:
    """Say whether a release's onnxruntime runs a graph of an opset; None where nobody told us."""
    if opset < ATTENTION_OPSET:
        return True
    if release.onnxruntime is None:
        return None
    return numbers(release.onnxruntime)[:2] >= ATTENTION_SINCE


def same_tensorrt(one: str | None, other: str | None) -> bool:
    """Compare two versions as far as a plan's loadability goes: major, minor and patch."""
    return bool(one and other) and numbers(one)[:3] == numbers(other)[:3]


def numbers(version: str | None) -> tuple[int, ...]:
    """Read the numbers a version begins with: ``10.13.3.9.post1`` is (10, 13, 3, 9)."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version or "")
    return tuple(int(part) for part in match[0].split(".")[:4]) if match else ()
