"""Options that contradict the graph, the backend or the GPU are refused; idle ones are told."""

from pathlib import Path

import pytest

from msn_export.engine import build
from msn_export.engine.build import build_engine
from msn_export.engine.options import Backend, BuildSpec, check_options
from msn_export.errors import BuildError
from msn_export.host import Device, Driver, NoDriver
from msn_export.runtime.versions import row_for
from msn_export.spec import ComputeCapability, Targets
from tests.builders.engine_builds import NEEDS_RTX, built, rtx, spec_of
from tests.builders.engine_graphs import Vit

pytestmark = NEEDS_RTX


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of(Vit(batch=4)), r"--batch 1:8:32 lies outside the graph: the batch of input 'x' is "
         r"fixed at 4; give --batch 4, or export"),
        (spec_of(Vit(batch=4), profiles="8"), "--batch 8:8:8 lies outside the graph"),
        (spec_of(Vit(quantised="fp8"), "8.6"), r"computes in fp8, which --compute-capability 8\.6 "
         r"cannot; it takes 8\.9 or later"),
        (spec_of(Vit(quantised="fp8"), "8.9 8.6"), r"which --compute-capability 8\.6 cannot"),
        (spec_of(Vit(quantised="fp8"), ""), r"computes in fp8, which GPUs before 8\.9 cannot; name "
         r"the target: --compute-capability 8\.9"),
        (spec_of(Vit(dtype="bf16"), "7.5"), r"bf16, which --compute-capability 7\.5 cannot"),
        (spec_of(Vit(dtype="fp32", attention="plain"), "7.5"), r"7\.5 has no fp32 matrix products"),
        (spec_of(Vit(), "9.0"), r"cannot compile for compute capability 9\.0; it can for 7\.5, 8\.0"
         r", 8\.6, 8\.9, 12\.0, 12\.1"),
        (spec_of(Vit(), workspace=1024), "no kernel fits into --workspace; raise it"),
        (spec_of(Vit(), version_compatible=True), r"cannot take --version-compatible: TensorRT-RTX "
         r"ships without the lean runtime"),
        (spec_of(Vit(), hardware_compatible=True), r"cannot take --hardware-compatible: without "
         r"--compute-capability its engines are for any GPU from Ampere on"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_contradiction_is_refused(tmp_path: Path, spec: BuildSpec, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build_engine(spec, rtx(), tmp_path / "x.engine")
    assert not (tmp_path / "x.engine").exists()


def test_options_without_effect_are_told_and_do_not_change_the_engine(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    spec = spec_of(Vit(), optimization_level=5, timing_cache=cache)
    result = build_engine(spec, rtx(), tmp_path / "x.engine")
    assert [note.split(":")[0] for note in result.notes] == [
        "--optimization-level has no effect",
        "--timing-cache has no effect",
    ]
    assert not cache.exists()
    assert result.output.read_bytes() == built(Vit()).output.read_bytes()


def test_several_targets_are_told_to_share_their_kernels() -> None:
    assert built(Vit(), "8.9 12.0").notes == (
        "one set of kernels serves all targets, that of 8.9; an engine for each target may be "
        "faster",
    )


def tensorrt_on(monkeypatch: pytest.MonkeyPatch, card: str, capability: str) -> Backend:
    """Have full TensorRT and a GPU found, neither of which is here."""
    row = row_for("tensorrt", "11.4.0")
    assert row is not None
    device = Device(0, card, ComputeCapability.parse(capability), 1)
    monkeypatch.setattr(build, "find_driver", lambda: Driver("13.0", (device,)))
    return Backend(row, "11.4.0")


def test_full_tensorrt_needs_its_gpu() -> None:
    row = row_for("tensorrt", "11.4.0")
    assert row is not None
    with pytest.raises(BuildError, match="use --backend tensorrt-rtx, which needs none"):
        check_options(spec_of(Vit(), ""), Backend(row, "11.4.0"), NoDriver("no NVIDIA driver"))


def test_full_tensorrt_builds_for_its_own_gpu_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = tensorrt_on(monkeypatch, "NVIDIA H200", "9.0")
    with pytest.raises(
        BuildError, match=r"11\.4\.0 cannot take --compute-capability: TensorRT com"
    ):
        build_engine(spec_of(Vit()), backend, tmp_path / "x.engine")


def test_an_engine_for_any_gpu_is_built_on_ampere_or_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = tensorrt_on(monkeypatch, "Tesla T4", "7.5")
    with pytest.raises(
        BuildError,
        match=r"--hardware-compatible needs a GPU of SM 8\.0 or later to build on, and Tesla T4 is "
        r"SM 7\.5; leave it out, or build where such a GPU is",
    ):
        build_engine(
            spec_of(Vit(), "", hardware_compatible=True),
            backend,
            tmp_path / "x.engine",
        )


@pytest.mark.parametrize(
    ("compatible", "targets"),
    [
        (False, Targets((ComputeCapability(8, 9),))),
        (True, Targets((ComputeCapability(8, 0),), later=True)),
    ],
)
def test_full_tensorrt_builds_for_its_gpu_or_any_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compatible: bool, targets: Targets
) -> None:
    backend = tensorrt_on(monkeypatch, "NVIDIA L4", "8.9")

    def pretend(*_args: object, **_limits: object) -> dict[str, object]:
        (tmp_path / "x.engine").write_bytes(b"compiled where the GPU is")
        return {"kernels": [], "notes": [], "warnings": [], "peak_rss": 1}

    monkeypatch.setattr(build, "run_child", pretend)
    monkeypatch.setattr(build, "by_profile", lambda _kernels: ())
    spec = spec_of(Vit(), "", hardware_compatible=compatible)
    assert build_engine(spec, backend, tmp_path / "x.engine").targets == targets
