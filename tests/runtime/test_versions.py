"""Which module loads an engine, and which versions of it do."""

import types

import pytest

from msn_export.errors import (
    MissingPackageError,
    RunnerError,
)
from msn_export.runtime import versions
from msn_export.runtime.versions import VERSIONS, LoadedTensorRT, load, may_run


def installed(monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Have modules of these versions installed, and no others."""
    made = {name: types.SimpleNamespace(__version__=text) for name, text in modules.items()}
    monkeypatch.setattr(versions.importlib.util, "find_spec", made.get)
    monkeypatch.setattr(versions.importlib, "import_module", made.__getitem__)


def test_full_tensorrt_is_taken_before_the_lean_runtime(monkeypatch) -> None:
    installed(monkeypatch, tensorrt="11.4.0.106", tensorrt_lean="11.4.0.106")
    assert str(load("tensorrt", compatible=True)) == "tensorrt 11.4.0.106"


def test_the_lean_runtime_runs_version_compatible_engines_alone(monkeypatch) -> None:
    installed(monkeypatch, tensorrt_lean="11.4.0.106")
    assert str(load("tensorrt", compatible=True)) == "tensorrt (lean) 11.4.0.106"
    with pytest.raises(
        MissingPackageError,
        match=r"^tensorrt is not installed; pip install 'msn-export\[tensorrt\]'$",
    ):
        load("tensorrt", compatible=False)


def test_nothing_installed_names_what_would_do(monkeypatch) -> None:
    installed(monkeypatch)
    with pytest.raises(MissingPackageError, match=r"\(or pip install tensorrt-lean, which is sm"):
        load("tensorrt", compatible=True)
    with pytest.raises(MissingPackageError, match=r"^tensorrt-rtx is not .*'msn-export\[rtx\]'$"):
        load("tensorrt-rtx", compatible=False)
    with pytest.raises(RunnerError, match="engines of 'openvino' are not supported"):
        load("openvino", compatible=False)


@pytest.mark.parametrize(
    ("backend", "module", "version"),
    [("tensorrt", "tensorrt", version) for version in ("7.2.3", "9.3.0", "10.0.1", "unknown")]
    + [("tensorrt-rtx", "tensorrt_rtx", version) for version in ("1.0.0", "1.4.9")],
)
def test_an_unsupported_version_is_told(monkeypatch, backend, module, version) -> None:
    installed(monkeypatch, **{module: version})
    with pytest.raises(RunnerError, match=f"^{module} {version} is not supported"):
        load(backend, compatible=False)


@pytest.mark.parametrize(
    ("backend", "module", "version"),
    [("tensorrt", "tensorrt", version) for version in ("8.6.0", "10.2.0")]
    + [("tensorrt-rtx", "tensorrt_rtx", "1.5.0")],
)
def test_the_first_supported_version_is_taken(monkeypatch, backend, module, version) -> None:
    installed(monkeypatch, **{module: version})
    assert str(load(backend, compatible=False)) == f"{backend} {version}"


def test_a_module_that_does_not_import_says_why(monkeypatch) -> None:
    installed(monkeypatch, tensorrt_rtx="1.7.1")

    def broken(_name: str) -> None:
        raise OSError("libtensorrt_rtx.so: cannot open shared object file")

    monkeypatch.setattr(versions.importlib, "import_module", broken)
    with pytest.raises(RunnerError, match="tensorrt_rtx is installed but does not import"):
        load("tensorrt-rtx", compatible=False)


@pytest.mark.parametrize(
    ("here", "built", "compatible", "expected"),
    [
        ("11.4.0.106", "11.4.0.106", False, True),
        ("11.4.0.106", "11.4.0", False, True),  # a header may tell less
        ("11.4.0.106", "11.3.0.1", False, False),
        ("11.4.0.106", "11.3.0.1", True, True),
        ("11.3.0.1", "11.4.0.106", True, False),  # never an older one
        ("11.4.0.106", "10.16.1.11", True, True),
        ("10.16.1.11", "8.6.1", True, True),
        ("11.4.0.106", "8.6.1", True, False),
        ("11.4.0.106", "", True, False),
    ],
)
def test_which_versions_load_an_engine(here, built, compatible, expected) -> None:
    loaded = LoadedTensorRT(None, VERSIONS[1], here)
    assert may_run(loaded, built, compatible=compatible) is expected
