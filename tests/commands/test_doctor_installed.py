"""What is installed is read off metadata, and what works is proved by an import."""

import importlib.metadata
from dataclasses import replace
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from msn_export.cli.commands import _graphs
from msn_export.commands import doctor
from msn_export.commands.doctor import (
    ImportProbe,
    module_of,
    modules_of,
    requirements_by_extra,
    wanted_packages,
)
from msn_export.spec import Dtype, Target
from msn_export.version_table import Client, table
from tests.fakes.installed import install


def test_extras_are_those_of_the_installed_metadata() -> None:
    found = requirements_by_extra()
    declared = importlib.metadata.metadata("msn-export").get_all("Provides-Extra")
    assert set(found) == {"", *declared}
    named = {extra: {requirement.name for requirement in of} for extra, of in found.items()}
    assert {"numpy", "click"} <= named[""]
    assert named["ort"] < named["graph"] < named["export"]  # each includes the one before
    assert "torch" in named["export"] - named["graph"]
    assert "msn-export" not in named["dev"]
    assert not named[""] & named["export"]


def test_every_package_that_is_installed_has_its_version_and_what_proves_it() -> None:
    found = {package.name: package for package in wanted_packages()}
    for name, module in (
        ("pillow", "PIL"),
        ("cuda-bindings", "cuda.bindings"),
        ("tensorrt-rtx", "tensorrt_rtx"),
        ("torch", "torch"),
        ("huggingface-hub", "huggingface_hub"),
    ):
        assert found[name].version == importlib.metadata.version(name)
        assert found[name].module == module
    assert "types-protobuf" not in found  # for developers: no command needs it


def test_a_module_is_found_where_a_distribution_keeps_it(tmp_path) -> None:
    install(tmp_path, "bundle", "1", {}, ("bundle-cu13==1",))
    install(tmp_path, "bundle-cu13", "1", {"bundle/__init__.py": "", "aaa/__init__.py": ""})
    install(tmp_path, "single", "1", {"single.py": "", "_private.py": ""})
    install(tmp_path, "shared", "1", {"space/part/__init__.py": "", "space/part/x.py": ""})
    install(tmp_path, "nothing", "1", {"data-files/x.txt": ""})
    listed = importlib.metadata.distributions(path=[str(tmp_path)])
    found = {distribution.name: distribution for distribution in listed}
    assert modules_of(found["bundle-cu13"]) == {"bundle", "aaa"}
    assert module_of(found["single"]) == "single"
    assert module_of(found["shared"]) == "space.part"
    assert module_of(found["nothing"]) is None


@pytest.mark.parametrize("plugin", [None, "onnxruntime-ep-cuda12", "onnxruntime-ep-cuda13"])
def test_an_onnxruntime_with_its_cuda_provider_as_a_plugin_stands_in(
    tmp_path, monkeypatch, plugin
) -> None:
    install(tmp_path, "onnxruntime", "1.31.1", {"onnxruntime/__init__.py": ""})
    if plugin is not None:
        install(tmp_path, plugin, "1.31.1", {"onnxruntime_ep_cuda/__init__.py": ""})
    listed = importlib.metadata.distributions(path=[str(tmp_path)])
    monkeypatch.setattr(doctor, "_installed", {one.name: one for one in listed}.get)
    found = doctor._found(Requirement("onnxruntime-gpu>=1.25"), ("ort",))
    assert (found.stand_in, found.plugin, found.fits) == ("onnxruntime", plugin, True)
    state = doctor._state(found, {"onnxruntime": ImportProbe("onnxruntime", None, "cpu")}, ())
    with_it = f" with {plugin}" if plugin else ""
    assert state.detail == f"onnxruntime{with_it} in its place; cpu"


def test_an_installed_runtime_is_compared_with_the_version_table(monkeypatch) -> None:
    versions = {"onnxruntime": "1.23.2", "openvino": "9999.0"}
    installed = {name: SimpleNamespace(version=version) for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_installed", installed.get)
    old, new = doctor.graph_support()
    assert (old.client, old.version) == ("onnxruntime", "1.23.2")
    assert {"portable int8", "tensorrt fp16"} <= set(old.takes)
    cell = table()[Target.TENSORRT][Dtype.INT8][Client.ONNXRUNTIME]
    assert old.refuses["tensorrt int8"] == cell.least
    assert old.refuses["tensorrt bf16"] is None
    assert (new.client, new.refuses) == ("OpenVINO", {})


def test_the_doctor_says_what_trt_builds_and_tensorrt_s_own_parser_does_not(monkeypatch) -> None:
    versions = {"onnxruntime": "1.23.2", "tensorrt": "10.13.3", "tensorrt-rtx": "1.7.1.116"}
    installed = {name: SimpleNamespace(version=version) for name, version in versions.items()}
    monkeypatch.setattr(doctor, "_installed", installed.get)
    ort, trt, rtx = doctor.graph_support()
    assert (ort.built_by_trt, "msn-export trt" in _graphs(ort)) == ((), False)
    assert _graphs(rtx) == (
        "every graph but tensorrt fp32, onnxruntime fp32, onnxruntime int8, onnxruntime fp8 as "
        "they are (no kernel for attention in fp32; msn-export trt builds them)"
    )
    assert trt.refuses["tensorrt fp16"] == "10.14"
    assert "every graph but tensorrt fp16 (10.14), " in _graphs(trt)
    assert _graphs(trt).endswith(_graphs(rtx).removeprefix("every graph but "))


def test_the_doctor_says_what_this_onnxruntime_does_not_load() -> None:
    (ours,) = [one for one in doctor.graph_support() if one.client == "onnxruntime"]
    rows = {f"{target} {dtype}": row for target, of in table().items() for dtype, row in of.items()}
    assert {*ours.takes, *ours.refuses} == rows.keys()
    assert all(rows[name][Client.ONNXRUNTIME].takes(ours.version) for name in ours.takes)
    assert "tensorrt bf16 (no version)" in _graphs(ours)
    assert _graphs(replace(ours, refuses={})) == "every graph that is written here"
