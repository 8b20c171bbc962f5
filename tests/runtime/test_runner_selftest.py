"""A runner's selftest: the golden values of a manifest, reproduced or not."""

from dataclasses import replace

import pytest

from msn_export import manifest
from msn_export.errors import ManifestError
from msn_export.graph import io
from msn_export.manifest import manifest_path
from msn_export.runtime import open_runner
from tests.builders.artifacts import classifier, copy_of


@pytest.mark.parametrize(
    "options", [(), ("--dtype", "fp16"), ("--input", "uint8"), ("--head", "tokens"),
                ("--batch", "4")]
)  # fmt: skip
def test_a_fresh_export_passes_its_selftest(options) -> None:
    with open_runner(classifier(*options)) as runner:
        told = runner.selftest()
    assert told.passed, str(told)
    assert told.agreement.images == 2
    assert told.reference.startswith("torch ")
    assert str(told).startswith("selftest passed: output '")


def test_another_graph_fails_the_selftest_with_its_figures(tmp_path) -> None:
    path = copy_of(classifier(), tmp_path)
    known = manifest.read(path)
    model = io.load(path)
    weights = model.graph.initializers["classifier.weight"]
    import onnx_ir as ir

    weights.const_value = ir.tensor(weights.const_value.numpy() * 1.01, name=weights.name)
    io.save(model, path)
    from msn_export.manifest import sha256_of

    manifest_path(path).write_text(
        manifest.seal(replace(known, sha256=sha256_of(path), bytes=path.stat().st_size))
    )
    with open_runner(path) as runner:
        told = runner.selftest()
    assert not told.passed
    assert "selftest failed (relative error" in str(told)


def test_an_export_without_a_check_has_no_golden_values_and_says_so() -> None:
    with (
        open_runner(classifier("--no-check")) as runner,
        pytest.raises(ManifestError, match=r"m\.onnx has no golden input to test with; export a"),
    ):
        runner.selftest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": "numpy.random.MT19937"}, "is none this version can draw; upgrade"),
        ({"shape": (2, 9999, 9999, 3)}, "is none this version can draw"),
        ({"shape": (999, 32, 32, 3)}, "golden values cannot be read"),
        ({"seed": -1}, "is none this version can draw"),
        ({"values": "not base64!"}, "golden values cannot be read"),
        ({"values": "AAAA"}, "golden values cannot be read"),
        ({"dim": 7}, "golden values cannot be read"),
        ({"output": "embedding"}, "golden output 'embedding' is none of the artifact's"),
    ],
)
def test_a_hostile_golden_record_is_refused(changes, message) -> None:
    known = manifest.read(classifier())
    with open_runner(classifier()) as runner:
        runner.manifest = replace(known, golden=replace(known.golden, **changes))
        with pytest.raises(ManifestError, match=message):
            runner.selftest()
