"""What a GPU benchmark runs side by side: torch in three ways, onnxruntime, and the engine.

Every contender takes normalised images [b, 3, h, w] as a float32 CUDA tensor, gives the [CLS]
embedding [b, dim] as a CUDA tensor, and keeps both on the card. The torch models and the graphs
compute in half precision inside; the cast of the input is theirs, and is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msn_export.errors import MsnExportError
from msn_export.models.vit import VitMsn
from msn_export.runtime import open_runner

Run = Callable[[Tensor], Tensor]
Engine = Path | MsnExportError  # or why there is none
DEVICE = "cuda"  # a rehearsal of the script runs on the CPU
# torch.compile and a card without room raise RuntimeErrors, a missing compiler an OSError
FAILURES = (MsnExportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Contender:
    """Something that turns images into embeddings, or the reason why it cannot here."""

    name: str
    run: Run | None
    reason: str = ""


def reference(model: VitMsn) -> Run:
    """Give the fp32 model on the card, TF32 off: what every contender is compared with."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    held = _on_card(model, "sdpa", torch.float32)
    return lambda images: held(images)[:, 0]


def contenders(model: VitMsn, graph: Path, engine: Engine, owned: ExitStack) -> Iterator[Contender]:
    """Make all contenders; ``owned`` closes their runners."""
    for name, make in (
        ("torch eager", lambda: _torch(model, "eager")),
        ("torch SDPA", lambda: _torch(model, "sdpa")),
        ("torch.compile", lambda: _compiled(model)),
        ("torch.compile, CUDA graphs", lambda: _copied(_compiled(model, mode="reduce-overhead"))),
        ("onnxruntime CUDA", lambda: _runner(graph, owned, providers=["cuda"])),
        ("engine", lambda: _runner(engine, owned, cuda_graphs=False)),
        ("engine, CUDA graphs", lambda: _runner(engine, owned, cuda_graphs=True)),
    ):
        try:
            yield Contender(name, make())
        except FAILURES as error:
            yield Contender(name, None, one_line(error))


def one_line(error: Exception) -> str:
    """Give what an error says, for a row of the table."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _torch(model: VitMsn, attention: Any) -> Run:
    held = _on_card(model, attention, torch.float16)

    def run(images: Tensor) -> Tensor:
        return held(images.half())[:, 0].float()

    return run


def _compiled(model: VitMsn, **options: Any) -> Run:
    """Compile for each batch by itself: a kernel for any batch would be the slower one."""
    compiled: Run = torch.compile(_torch(model, "sdpa"), dynamic=False, **options)
    return compiled


def _on_card(model: VitMsn, attention: Any, dtype: torch.dtype) -> VitMsn:
    copy = VitMsn(model.config, attention=attention)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False).to(DEVICE, dtype)


def _copied(run: Run) -> Run:
    """Copy what a CUDA graph of torch gives: its memory is used again by the next call."""
    return lambda images: run(images).clone()


def _runner(path: Engine, owned: ExitStack, **options: Any) -> Run:
    if isinstance(path, MsnExportError):
        raise path
    runner = owned.enter_context(open_runner(path, eager_kernels=True, **options))
    return lambda images: runner(images)["embedding"]
