"""A file of kernel timings that makes the next build on the same kind of GPU faster."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msn_export.engine.bindings import IBuilderConfig, IHostMemory, ITimingCache
from msn_export.spec import ComputeCapability


def default_path(version: str, gpu: str, capability: ComputeCapability) -> Path | None:
    """Name the user's cache file for a TensorRT version and a GPU: timings fit no other.

    None for a user without a home, as in a container that runs as a number.
    """
    # os.path's leaves a home that there is not as it is; Path's raises
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    if not Path(root).is_absolute():  # the XDG Base Directory Specification ignores such a path
        return None
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sm = f"sm{capability.major}{capability.minor}"
    return Path(root) / "msn-export" / f"timing-{version}-{sm}-{model}"


def attach(config: IBuilderConfig, path: Path) -> str | None:
    """Give the builder the timings in ``path``; say why where they could not be used."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        content = b""
        note = f"timing cache {path} cannot be read ({error.strerror}); it is started anew"
    else:
        note = f"timing cache {path} is of another TensorRT or GPU, or damaged; it is started anew"
        cache: ITimingCache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return None
    fresh: ITimingCache = config.create_timing_cache(b"")
    config.set_timing_cache(fresh, ignore_mismatch=False)
    return note


def store(config: IBuilderConfig, path: Path) -> str | None:
    """Merge the build's timings into ``path``; say why where they could not be kept.

    The engine is compiled by now: it is not lost for the sake of the next one's speed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock_on(path.parent):
            _merge(config, path)
    except OSError as error:
        return f"timing cache {path} cannot be written ({error.strerror}); timings are not kept"
    return None


def _merge(config: IBuilderConfig, path: Path) -> None:
    """Add what another build has written meanwhile; replace the file as a whole."""
    cache: ITimingCache = config.get_timing_cache()
    if path.is_file():
        other: ITimingCache = config.create_timing_cache(path.read_bytes())
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
    content: IHostMemory = cache.serialize()
    with tempfile.NamedTemporaryFile(
        prefix=f".{path.name}-", dir=path.parent, delete=False
    ) as file:
        try:
            file.write(memoryview(content))
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextmanager
def _lock_on(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
