"""Every TensorRT name the code uses exists in the real modules; no GPU, no TensorRT libraries."""

import importlib.util
import json
from pathlib import Path

import pytest

import msn_export
from msn_export.engine import compile
from msn_export.runtime import versions
from msn_export.runtime.versions import VERSIONS, TensorRTVersion, row_for
from tests.fakes.engine_bindings import Names, collect, declared_classes, look_up
from tests.fakes.real_bindings import RELEASES, module_of, names_in

PACKAGE = Path(msn_export.__file__).parent
CLASSES = frozenset().union(
    *(declared_classes(Path(module.__file__).read_text()) for module in (compile, versions))
)
DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def code() -> Names:
    """What engine/ uses."""
    return names_in(PACKAGE / "engine", CLASSES)


def named_members(row: TensorRTVersion) -> set[str]:
    """The enum members that a row names as text."""
    flags = {f"NetworkDefinitionCreationFlag.{flag}" for flag in row.network_flags}
    flags |= {f"BuilderFlag.{flag}" for flag in row.precision_flags.values()}
    return flags | {f"PreviewFeature.{name}" for name in row.preview_features}


def required(names: Names, row: TensorRTVersion) -> set[str]:
    return (names.used - row.lacks) | named_members(row)


def test_every_object_of_tensorrt_has_a_known_class(code: Names) -> None:
    assert code.unclear == []


def test_the_code_names_what_it_is_known_to_use(code: Names) -> None:
    expected = {
        "Builder", "OnnxParser", "Runtime", "IBuilderConfig.set_flag", "MemoryPoolType.WORKSPACE",
        "IProgressMonitor.step_complete", "IOptimizationProfile.set_shape", "ITensor.dtype",
        "EngineInspector.get_engine_information", "IAttention.decomposable",
    }  # fmt: skip
    assert expected <= code.used
    assert code.optional >= {"ParserError.node_name", "ParserError.node_operator"}


@pytest.mark.network
@pytest.mark.parametrize(("distribution", "version"), RELEASES, ids=lambda value: value)
def test_real_module_has_every_name(
    distribution: str, version: str, code: Names, stubs: Path
) -> None:
    row = row_for("tensorrt", version)
    assert row is not None
    folder = module_of(distribution, version)
    found = look_up(required(code, row) | row.lacks, folder, "tensorrt_bindings", stubs)
    assert found["version"] == version
    assert set(found["missing"]) - row.lacks == set(), "used, but not in this TensorRT"
    assert row.lacks - set(found["missing"]) == set(), "declared as lacking, but there"


def test_installed_rtx_module_has_every_name(code: Names) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    found = look_up(code.used, Path(), "tensorrt_rtx")
    row = row_for("tensorrt_rtx", found["version"])
    assert row is not None
    assert look_up(required(code, row), Path(), "tensorrt_rtx")["missing"] == []


def test_8_6_has_every_name(code: Names) -> None:
    facts = json.loads((DATA / "tensorrt_8_6_members.json").read_text())
    classes = {name: set(members.split()) for name, members in facts["members"].items()}
    row = row_for("tensorrt", facts["version"])
    assert row is not None
    there = set(classes) | {f"{name}.{one}" for name, members in classes.items() for one in members}
    assert required(code, row) - there == set()
    assert row.lacks & there == set()


def test_rows_declare_no_name_that_nothing_uses(code: Names) -> None:
    for row in VERSIONS:
        assert row.lacks - code.used == set()


@pytest.mark.network
@pytest.mark.parametrize(
    ("snippet", "removed"),
    [
        ("def f(trt: TensorRT): return trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("def f(c: IBuilderConfig): c.int8_calibrator = 1", "IBuilderConfig.int8_calibrator"),
        ("def f(trt):\n  class C(trt.IInt8EntropyCalibrator2): ...", "IInt8EntropyCalibrator2"),
        ("class M(trt.IProgressMonitor):\n  def step(self): ...", "IProgressMonitor.step"),
        ("e: ICudaEngine = make()\ne.max_batch_size", "ICudaEngine.max_batch_size"),
    ],
)
def test_a_removed_member_is_found(snippet: str, removed: str, stubs: Path) -> None:
    row = row_for("tensorrt", "11.4.0.106")
    assert row is not None
    names = collect(snippet, CLASSES)
    assert names.unclear == []
    folder = module_of("tensorrt-cu13-bindings", "11.4.0.106")
    missing = look_up(required(names, row), folder, "tensorrt_bindings", stubs)["missing"]
    assert removed in missing


@pytest.mark.parametrize(
    "snippet",
    [
        "def f(trt):\n  b = trt.Builder(1)\n  b.reset()",
        "def f(b: Builder):\n  b.create_builder_config().flags = 1",
        "def f(layer: ILayer):\n  layer.precision.anything",
        "def f(n: INetworkDefinition):\n  t = n.get_input(0)\n  t.shape",
    ],
)
def test_an_object_without_a_class_is_told(snippet: str) -> None:
    assert len(collect(snippet, CLASSES).unclear) == 1


def test_only_the_8_6_row_names_removed_flags() -> None:
    naming = [row.since for row in VERSIONS if "BuilderFlag.FP16" in named_members(row)]
    assert naming == [(8, 6)]
