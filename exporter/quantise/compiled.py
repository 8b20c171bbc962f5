"""What TensorRT makes of a quantised graph and of its twin in half precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msn_export.driver import NoDriver, find_driver
from msn_export.engine.backend import find_backend
from msn_export.engine.build import build_engine
from msn_export.engine.census import ALLOWED, not_multiplied_in
from msn_export.engine.job import BuildSpec
from msn_export.engine.options import judge, require_capable
from msn_export.errors import BuildError, MissingPackageError
from msn_export.spec import BatchRange, ComputeCapability, Dtype

# The first generation with both int8 and fp8 matrix products: compiled for where no GPU is and
# none is named.
_CAPABILITY = ComputeCapability(8, 9)


@dataclass(frozen=True, slots=True)
class Twin:
    """A graph to compile, and the products in it that must multiply in 8 bits."""

    path: Path
    dtype: Dtype
    products: Sequence[str] = ()


def require_target(capability: ComputeCapability, dtypes: Sequence[Dtype]) -> None:
    """Refuse, before any work is done, a GPU generation that nothing compiles for here.

    Args:
        capability: the generation.
        dtypes: what the graphs to compile compute in.

    Raises:
        BuildError: TensorRT does not compile for it here, or it does not compute in a dtype.
        MissingPackageError: there is no TensorRT.
    """
    judge(BuildSpec(Path(), (BatchRange(),), (capability,)), find_backend("auto"), find_driver())
    require_capable({dtype.upper() for dtype in dtypes}, (capability,))


def compile_both(
    twins: Mapping[str, Twin],
    profile: BatchRange,
    stage: Path,
    capability: ComputeCapability | None = None,
) -> dict[str, Any]:
    """Compile each graph and count its kernels.

    Args:
        twins: the graphs, by name.
        profile: the batches to tune for.
        stage: the folder the engines are written to.
        capability: the GPU generation to compile for; None is this machine's, so that the engines
            can be timed, or 8.9 where there is none.

    Returns:
        By name: kernels, fused attention, products by dtype, ``multiplied`` of ``products`` in 8
        bits and the engine's bytes; and ``compiler``. Or ``reason``, where nothing compiles here.
    """
    try:
        backend = find_backend("auto")
        told: dict[str, Any] = {"compiler": f"{backend}"}
        capabilities = (capability or _own(),) if backend.flavour.targets_capabilities else ()
        if capabilities:
            told["compiler"] += f" for SM {capabilities[0]}"
        for name, twin in twins.items():
            spec = BuildSpec(twin.path, (profile,), capabilities, precision=twin.dtype)
            built = build_engine(spec, backend, engine_path(stage, name))
            census = built.census
            wrong = not_multiplied_in(census, ALLOWED[twin.dtype][0], twin.products)
            told[name] = {
                "kernels": len(census.kernels),
                "fused_attention": len(census.fused_attention),
                "gemm_dtypes": census.gemm_dtypes,
                "products": len(twin.products),
                "multiplied": len(twin.products) - len(wrong),
                "bytes": built.bytes,
            }
    except (BuildError, MissingPackageError) as error:
        return {"reason": f"not compiled: {error}"}
    return told


def engine_path(stage: Path, name: str) -> Path:
    """Say where ``compile_both`` puts the engine called ``name``."""
    return stage / f"{name}.engine"


def _own() -> ComputeCapability:
    driver = find_driver()
    return _CAPABILITY if isinstance(driver, NoDriver) else driver.devices[0].capability
