"""What is installed is read off metadata, and what works is proved by an import."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from msn_export.commands import doctor
from msn_export.commands.doctor import (
    ImportProbe,
    module_of,
    modules_of,
    probe,
    requirements_by_extra,
    wanted_packages,
)
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
    assert found["types-protobuf"].module is None  # stubs: nothing imports


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


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("", None),
        ("raise ImportError('no luck')", "ImportError: no luck"),
        ("import os; os.abort()", "importing it ends the process (SIGABRT)"),
        ("import sys; sys.exit(3)", "it says nothing"),
        ("print('hello'); import sys; print('noise', file=sys.stderr)", None),
    ],
)
def test_a_probe_survives_whatever_a_module_does(code, fault, tmp_path, monkeypatch) -> None:
    (tmp_path / "suspect.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = probe("suspect")
    assert found.fault is None if fault is None else found.fault.startswith(fault)


def test_a_probe_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    (tmp_path / "suspect.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("msn_export.commands.doctor._TIMEOUT", 0.5)
    assert "takes more than" in (probe("suspect").fault or "")
