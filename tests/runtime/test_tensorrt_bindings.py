"""Every name of TensorRT and CUDA that running an engine uses exists in the real modules.

And the stand-ins promise nothing that the real modules do not have.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import msn_export
from msn_export.runtime import versions
from msn_export.runtime.versions import VERSIONS, TensorRTVersion, row_for
from tests.fakes import tensorrt_stand_in
from tests.fakes.cuda_stand_in import CudaStandIn
from tests.fakes.engine_bindings import CUDA, Names, collect, declared_classes, look_up
from tests.fakes.real_bindings import LEAN, RELEASES, module_of, names_in
from tests.fakes.recorder import PAIRS
from tests.fakes.tensorrt_stand_in import COMMON, ROWS, Runtime

CLASSES = declared_classes(Path(versions.__file__).read_text())
DATA = Path(__file__).parent.parent / "data"
# The names that only one way of making contexts uses; the code asks for the way before it does.
OWN = {
    "strategy": {
        "ExecutionContextAllocationStrategy", "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ICudaEngine.create_execution_context", "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.set_device_memory",
    },
    "bare": {
        "ICudaEngine.create_execution_context_without_device_memory",
        "ICudaEngine.device_memory_size", "IExecutionContext.device_memory",
    },
    "config": {
        "CudaGraphStrategy", "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "ICudaEngine.create_execution_context", "ICudaEngine.create_runtime_config",
        "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
        "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.set_runtime_cache",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def code() -> Names:
    """What runtime/ uses."""
    return names_in(Path(msn_export.__file__).parent / "runtime", CLASSES)


def required(names: Names, row: TensorRTVersion) -> set[str]:
    tensorrt = {name for name in names.used if not name.startswith(CUDA)}
    return tensorrt - set().union(*OWN.values()) | OWN[row.contexts]


def test_every_object_has_a_known_class(code: Names) -> None:
    assert code.unclear == []


def test_the_code_names_what_it_is_known_to_use(code: Names) -> None:
    assert set().union(*OWN.values()) <= code.used
    assert {
        "Runtime.deserialize_cuda_engine", "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3", "IExecutionContext.set_optimization_profile_async",
        "CudaDriver.cuGraphLaunch", "CudaDriver.cuMemFree",
        "CudaDriver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
    } <= code.used  # fmt: skip


def test_the_real_cuda_bindings_have_every_name(code: Names) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    names = {name.removeprefix(f"{CUDA}.") for name in code.used if name.startswith(f"{CUDA}.")}
    assert len(names) > 25
    assert look_up(names, Path(), "cuda.bindings.driver")["missing"] == []


@pytest.mark.network
@pytest.mark.parametrize(("distribution", "version"), RELEASES, ids=lambda value: value)
def test_the_real_tensorrt_has_every_name(
    distribution: str, version: str, code: Names, stubs: Path
) -> None:
    row = row_for("tensorrt", version)
    assert row is not None
    folder = module_of(distribution, version)
    found = look_up(required(code, row), folder, "tensorrt_bindings", stubs)
    assert found == {"version": version, "missing": []}


@pytest.mark.network
def test_the_real_lean_runtime_has_every_name(code: Names, stubs: Path) -> None:
    row = row_for("tensorrt_lean", LEAN[1])
    assert row is not None
    found = look_up(required(code, row), module_of(*LEAN), "tensorrt_lean_bindings", stubs)
    assert found == {"version": LEAN[1], "missing": []}


def test_the_installed_rtx_module_has_every_name(code: Names) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    (row,) = (row for row in VERSIONS if row.module == "tensorrt_rtx")
    assert look_up(required(code, row), Path(), "tensorrt_rtx")["missing"] == []


def members_8_6() -> set[str]:
    facts = json.loads((DATA / "tensorrt_8_6_members.json").read_text())
    classes = {name: set(members.split()) for name, members in facts["members"].items()}
    return set(classes) | {f"{name}.{one}" for name, members in classes.items() for one in members}


def test_8_6_has_every_name(code: Names) -> None:
    row = row_for("tensorrt", "8.6.0")
    assert row is not None
    assert required(code, row) - members_8_6() == set()


@pytest.mark.parametrize(
    "snippet",
    [
        "class A:\n  def __init__(self, d):\n    self.cuda: CudaDriver = d\n"
        "  def f(self):\n    self.cuda.cuMemAllocate(1)",
        "class A:\n  cuda: CudaDriver\n  def f(self):\n    return self.cuda.cuMemAllocate",
        "def f(cuda: CudaDriver):\n  cuda.cuMemAllocate(1)",
    ],
)
def test_a_name_that_does_not_exist_is_found(snippet: str) -> None:
    names = collect(snippet, CLASSES)
    assert names.used == {"CudaDriver.cuMemAllocate"}
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    assert look_up({"cuMemAllocate"}, Path(), "cuda.bindings.driver")["missing"]


def test_no_test_imports_a_tensorrt_while_tests_are_collected() -> None:
    """So that ``-m gpu``, which collects them all, has one in its process: that of the card."""
    loads = re.compile(r"(importorskip|import_module|import)\W+tensorrt(_rtx|_lean)?\b")
    tests = Path(__file__).parent.parent
    for file in set(tests.rglob("*.py")) - set((tests / "data").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert not loads.search(ast.unparse(node)), f"{file.name}, line {node.lineno}"


# the stand-ins


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def functions(kind: type) -> list[str]:
    return sorted(name for name in public(kind) if name.startswith("cu"))


@pytest.mark.parametrize("name", functions(CudaStandIn))
def test_the_cuda_stand_in_has_the_real_parameters_and_results(name: str) -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is missing")
    function, stand_in = getattr(real, name), CudaStandIn()
    wanted = list(inspect.signature(function).parameters)
    assert list(inspect.signature(getattr(stand_in, name)).parameters) == wanted
    # behind the error code, the real docstring lists each value that is returned: "ctx : CUcontext"
    returned = (function.__doc__ or "").split("Returns\n", 1)[-1].split("See Also")[0]
    values = re.findall(r"^\s*(\w+) : ", returned, re.MULTILINE)
    gives = {*PAIRS, "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemGetInfo", "cuCtxPopCurrent"}
    gives = gives - {"cuCtxPushCurrent"} | {"cuStreamIsCapturing"}
    assert len(values) == (name in gives) + (name == "cuMemGetInfo"), returned


def test_the_cuda_stand_in_has_the_real_names() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is missing")
    names = public(CudaStandIn) | {
        f"{kind.__name__}.{one.name}"
        for kind in (
            CudaStandIn.CUresult,
            CudaStandIn.CUstreamCaptureMode,
            CudaStandIn.CUstreamCaptureStatus,
        )
        for one in kind
    }
    assert look_up(names, Path(), "cuda.bindings.driver")["missing"] == []
    assert {*PAIRS, *PAIRS.values()} <= names


def promised(contexts: str) -> set[str]:
    """List what the stand-in has for one way of making contexts."""
    row = ROWS[contexts]
    kinds = {"ICudaEngine": row.engine, "IExecutionContext": row.context, "Runtime": Runtime}
    kinds |= {kind.__name__: kind for kind in (*COMMON, *row.names)}
    if contexts == "config":
        kinds["IRuntimeConfig"] = tensorrt_stand_in.IRuntimeConfig
        kinds["IRuntimeCache"] = tensorrt_stand_in.IRuntimeCache
    members = {f"{name}.{one}" for name, kind in kinds.items() for one in public(kind)}
    plain = {f"{name}.{one}" for name in kinds for one in ("name", "value")}
    return members | set(kinds) - plain


@pytest.mark.network
@pytest.mark.parametrize(("distribution", "version"), RELEASES, ids=lambda value: value)
def test_the_tensorrt_stand_in_has_the_real_members(
    distribution: str, version: str, stubs: Path
) -> None:
    folder = module_of(distribution, version)
    missing = look_up(promised("strategy"), folder, "tensorrt_bindings", stubs)["missing"]
    assert missing == []


def test_the_rtx_stand_in_has_the_real_members() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    assert look_up(promised("config"), Path(), "tensorrt_rtx")["missing"] == []


def test_the_8_6_stand_in_has_the_real_members() -> None:
    assert promised("bare") - members_8_6() == set()
