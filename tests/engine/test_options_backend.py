"""Which TensorRT is found, what is said when none is, and what each row of the table says."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from msn_export.engine import options as subject
from msn_export.engine.options import Backend, find_backend, require_buildable
from msn_export.errors import BuildError, MissingPackageError, SpecError
from msn_export.host import Device, Driver, NoDriver
from msn_export.runtime.versions import VERSIONS, row_for
from msn_export.spec import ComputeCapability

CARD = Driver("13.0", (Device(0, "NVIDIA H200", ComputeCapability(9, 0), 150 << 30),))
NO_CARD = NoDriver("no NVIDIA driver (libcuda.so.1 cannot be loaded)")


def fake_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Put a module where both this process and its children find it first."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )


def test_rtx_is_found_with_its_version() -> None:
    found = find_backend("tensorrt-rtx")
    assert found.version == importlib.metadata.version("tensorrt-rtx")
    assert str(found) == f"tensorrt-rtx {found.version}"
    assert found.row.builds_without_gpu


def test_finding_loads_no_tensorrt_into_this_process() -> None:
    code = (
        "import sys; from msn_export.engine.options import find_backend; "
        "find_backend('tensorrt-rtx'); print([m for m in sys.modules if m.startswith('tensorrt')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_unknown_name_is_refused() -> None:
    with pytest.raises(SpecError, match="'trtexec' is unknown; expected auto, tensorrt or"):
        find_backend("trtexec")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "tensorrt",
            r"pip install 'msn-export\[tensorrt\]' \(needs a GPU; .* is a stub that downl",
        ),
        ("tensorrt-rtx", r"pip install 'msn-export\[rtx\]' \(95 MB, all from PyPI"),
    ],
)
def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingPackageError, match=f"^{name} is not installed; {line}"):
        find_backend(name)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open')", "libnvinfer.so.11: cannot open"),
        ("import os; os.abort()", "exit -6"),
    ],
)
def test_a_package_that_does_not_import_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    fake_module(monkeypatch, tmp_path, "tensorrt", source)
    with pytest.raises(
        MissingPackageError, match="tensorrt is installed but does not import"
    ) as at:
        find_backend("tensorrt")
    assert reason in str(at.value)
    assert "the vendor's own index" in str(at.value)


@pytest.mark.parametrize("version", ["7.2.3", "8.5.3", "9.3.0", "unknown"])
def test_an_unsupported_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    fake_module(monkeypatch, tmp_path, "tensorrt", f"__version__ = {version!r}")
    with pytest.raises(MissingPackageError, match=f"tensorrt {version} is not supported"):
        find_backend("tensorrt")


@pytest.mark.parametrize(
    ("driver", "source", "expected"),
    [
        (CARD, "__version__ = '11.4.0.106'", "tensorrt 11.4.0.106"),
        (CARD, "raise ImportError", "tensorrt-rtx "),
        (NO_CARD, "__version__ = '11.4.0.106'", "tensorrt-rtx "),
    ],
)
def test_auto_takes_full_tensorrt_only_where_it_could_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: object, source: str, expected: str
) -> None:
    fake_module(monkeypatch, tmp_path, "tensorrt", source)
    monkeypatch.setattr(subject, "find_driver", lambda: driver)
    assert str(find_backend()).startswith(expected)


def test_auto_with_nothing_installed_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(subject, "find_driver", lambda: CARD)
    with pytest.raises(MissingPackageError, match=r"msn-export\[tensorrt\].*msn-export\[rtx\]"):
        find_backend()


@pytest.mark.parametrize(
    ("module", "version", "since"),
    [
        ("tensorrt", "8.6.1", (8, 6)),
        ("tensorrt", "10.0.1", (10, 0)),
        ("tensorrt", "10.9.0.34", (10, 2)),
        ("tensorrt", "10.14.1.48", (10, 14)),
        ("tensorrt", "11.4.0.106", (10, 14)),
        ("tensorrt_rtx", "1.7.1.116", (1, 5)),
    ],
)
def test_version_chooses_the_row(module: str, version: str, since: tuple[int, int]) -> None:
    row = row_for(module, version)
    assert row is not None
    assert row.since == since


def test_what_the_rows_say() -> None:
    table = {
        (row.backend, row.since): (
            row.strongly_typed,
            "EXPLICIT_BATCH" in row.network_flags,
            row.builds_without_gpu,
            row.targets_capabilities,
            row.has_attention,
        )
        for row in VERSIONS
        if not row.only_compatible  # the lean runtime compiles nothing
    }
    assert table == {
        ("tensorrt-rtx", (1, 5)): (True, False, True, True, True),
        ("tensorrt", (10, 14)): (True, False, False, False, True),
        ("tensorrt", (10, 2)): (True, False, False, False, False),
        ("tensorrt", (10, 0)): (True, False, False, False, False),
        ("tensorrt", (8, 6)): (False, True, False, False, False),
    }


def test_full_tensorrt_without_a_driver_is_refused_before_it_ends_the_process() -> None:
    row = row_for("tensorrt", "11.4.0.106")
    assert row is not None
    with pytest.raises(
        BuildError,
        match=r"tensorrt 11\.4\.0\.106 compiles only where a GPU is, and here: no NVIDIA driver "
        r".*use --backend tensorrt-rtx",
    ):
        require_buildable(Backend(row, "11.4.0.106"), NO_CARD)
    require_buildable(Backend(row, "11.4.0.106"), CARD)
