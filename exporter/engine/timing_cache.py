"""A file of kernel timings that makes the next build on the same kind of GPU faster."""

import fcntl
import os
import re
import tempfile
from pathlib import Path

from msn_export.engine.bindings import IBuilderConfig, IHostMemory, ITimingCache
from msn_export.spec import ComputeCapability


def default_path(version: str, gpu: str, capability: ComputeCapability) -> Path:
    """Name the user's cache file for a TensorRT version and a GPU: timings fit no other."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root else Path.home() / ".cache"
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sm = f"sm{capability.major}{capability.minor}"
    return folder / "msn-export" / f"timing-{version}-{sm}-{model}"


def attach(config: IBuilderConfig, path: Path) -> str | None:
    """Give the builder the timings in ``path``; say why where they could not be used."""
    content = path.read_bytes() if path.is_file() else b""
    cache: ITimingCache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return None
    fresh: ITimingCache = config.create_timing_cache(b"")
    config.set_timing_cache(fresh, ignore_mismatch=False)
    return f"timing cache {path} is of another TensorRT or GPU, or damaged; it is started anew"


def store(config: IBuilderConfig, path: Path) -> None:
    """Merge the build's timings with what another build has written meanwhile; replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        cache: ITimingCache = config.get_timing_cache()
        if path.is_file():
            other: ITimingCache = config.create_timing_cache(path.read_bytes())
            if other is not None:
                cache.combine(other, ignore_mismatch=False)
        content: IHostMemory = cache.serialize()
        handle, staged = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(memoryview(content))
        Path(staged).replace(path)
    finally:
        os.close(folder)
