"""What is checked before an artifact is loaded, and what is said where it does not belong."""

import importlib
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from msn_export import manifest as manifests
from msn_export.errors import (
    GraphError,
    ManifestError,
    MissingPackageError,
    RunnerError,
)
from msn_export.host import Device
from msn_export.manifest import manifest_path, sha256_of
from msn_export.onnx_header import GraphMetadata
from msn_export.runtime import onnxruntime, open_runner, opening
from msn_export.spec import BatchRange, ComputeCapability, Target
from tests.builders.artifacts import alone, classifier, copy_of, engine, foreign, pretend
from tests.builders.networks import Network, compute

ADA = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 24 << 30)
HOPPER = Device(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)


def test_what_does_not_exist_is_told(tmp_path) -> None:
    with pytest.raises(RunnerError, match=r"none\.engine does not exist; give an \.onnx file or"):
        open_runner(tmp_path / "none.engine")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "path is a NoneType; give an .onnx file or an engine, as text or a Path"),
        (5, "path is a int; give an .onnx file or an engine, as text or a Path"),
        (b"m.onnx", "path is a bytes; give an .onnx file or an engine, as text or a Path"),
        ("", "the path is empty; give an .onnx file or an engine"),
        (".", ". is a folder; give an .onnx file or an engine"),
        ("/dev/null", "/dev/null is no regular file; give an .onnx file or an engine"),
        ("a\0b.onnx", "a\\u0000b.onnx does not exist; give an .onnx file or an engine"),
        ("\x1b[31mm.onnx", "\\u001b[31mm.onnx does not exist; give an .onnx file or an engine"),
        ("a\udc80.onnx", "a\ufffd.onnx does not exist; give an .onnx file or an engine"),
        ("x" * 300, f"{'x' * 300} cannot be opened: File name too long; give an .onnx file or an"
         " engine"),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_path_that_is_none_is_told(path, message) -> None:
    with pytest.raises(RunnerError) as at:
        open_runner(path)
    assert str(at.value) == message


def test_a_loop_of_links_is_told(tmp_path) -> None:
    (tmp_path / "m.onnx").symlink_to(tmp_path / "m.onnx")
    with pytest.raises(RunnerError, match=r"m\.onnx (does not exist|cannot be opened: Too many)"):
        open_runner(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"device": "0"}, "device is '0'; expected a whole number of at least 0"),
        ({"device": -1}, "device is -1; expected a whole number of at least 0"),
        ({"device": True}, "device is True; expected a whole number of at least 0"),
        ({"threads": 0}, "threads is 0; expected a whole number from 1 to 4096"),
        ({"threads": 10**30}, f"threads is {10**30}; expected a whole number from 1 to 4096"),
        ({"threads": 1.5}, "threads is 1.5; expected a whole number from 1 to 4096"),
        ({"contexts": "2"}, "contexts is '2'; expected a whole number of at least 1"),
        ({"contexts": 0}, "contexts is 0; expected a whole number of at least 1"),
        ({"providers": 5}, "providers is 5; give a list of names, as ['cuda', 'cpu']"),
        ({"providers": [None]}, "providers is [None]; give a list of names, as ['cuda', 'cpu']"),
        ({"providers": [("cpu", {})]}, "providers is [('cpu', {})]; give a list of names, as ['cu"
         "da', 'cpu']"),
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_of_another_kind_is_told(argument, message) -> None:
    with pytest.raises(RunnerError) as at:
        open_runner(classifier(), **argument)
    assert str(at.value) == message


def test_numbers_of_numpy_are_numbers() -> None:
    with open_runner(classifier(), providers=["cpu", "cpu"], threads=np.int64(1)) as runner:
        assert runner._session.get_session_options().intra_op_num_threads == 1


def test_an_engine_takes_no_providers() -> None:
    with pytest.raises(RunnerError, match="takes no providers; it runs in the TensorRT it is for"):
        open_runner(engine(), providers=["cuda"])


def test_a_described_engine_opens_and_runs(tmp_path, monkeypatch) -> None:
    """A whole artifact of full TensorRT: file, manifest, hash, and the stand-in to run it."""
    network = Network(profiles=((1, 2, 4),))
    path = foreign(tmp_path, network)
    known = manifests.read(engine())
    assert known is not None
    assert known.engine is not None
    record = replace(known.engine, backend="tensorrt", version="11.4.0.106")
    described = replace(
        known,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        engine=record,
        profiles=(BatchRange(1, 2, 4),),
    )
    manifest_path(path).write_text(manifests.seal(described))
    recorder = pretend(monkeypatch, "strategy")
    with open_runner(path, contexts=1, cuda_graphs=False) as runner:
        images = network.images(6)
        np.testing.assert_array_equal(runner(images).odd, compute(network, images)["odd"])
        assert runner.labels == ("class 0", "class 1", "class 2")
    assert recorder.live() == {}


def test_every_option_arrives_where_an_engine_is_opened(monkeypatch) -> None:
    given: list[object] = []

    def require_device(_engine, _driver, device):
        given.append(("device", device))
        return ADA

    monkeypatch.setattr(opening, "require_device", require_device)
    monkeypatch.setattr(opening, "load_cuda", given.append)
    monkeypatch.setattr(opening, "load", lambda backend, **told: given.append(told))
    monkeypatch.setattr(opening, "require_version", lambda *_: None)
    monkeypatch.setattr(
        opening, "TrtRunner", lambda verified, host, **options: (verified, host, options)
    )
    known = manifests.read(engine())
    verified, host, options = open_runner(
        engine(), device=3, contexts=5, cuda_graphs=False, eager_kernels=True
    )
    assert given == [("device", 3), "tensorrt-rtx", {"compatible": False}]
    assert (verified.content, verified.manifest) == (engine().read_bytes(), known)
    assert not verified.compatible
    assert host.device is ADA
    assert options == {"contexts": 5, "cuda_graphs": False, "eager_kernels": True}
    _, _, options = open_runner(engine())
    assert options == {"contexts": 2, "cuda_graphs": True, "eager_kernels": False}


def test_every_option_arrives_where_a_graph_is_opened(monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "OrtRunner", lambda *given, **told: (given, told))
    known = manifests.read(classifier())
    opened = open_runner(str(classifier()), providers=["cuda"], device=3, threads=7)
    assert opened == (
        (classifier(), ["cuda"]),
        {"device": 3, "threads": 7, "manifest": known, "metadata": None},
    )


def test_a_graph_that_is_not_the_one_described_is_refused(tmp_path) -> None:
    path = copy_of(classifier(), tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ManifestError, match="is not the file its manifest describes"):
        open_runner(path)


def test_what_is_no_graph_is_told(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"m\.onnx is not an ONNX file \(wire type 6 at byte 1\)"):
        open_runner(path)


def test_a_graph_that_onnxruntime_refuses_is_told(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    text = "g (float[b,3,4,4] x) => (float[b,3,4,4] y) { y = Unheard (x) }"
    path.write_bytes(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
                     .SerializeToString())  # fmt: skip
    with pytest.raises(GraphError, match=r"onnxruntime refuses m\.onnx: .*Unheard"):
        open_runner(path, providers=["cpu"])


def test_a_graph_alone_is_what_its_own_file_says(tmp_path, photographs) -> None:
    known = manifests.read(classifier())
    assert known is not None
    path, pictures = alone(classifier(), tmp_path / "m.onnx"), sorted(photographs.iterdir())[:2]
    with open_runner(path, providers=["cpu"]) as runner, open_runner(classifier()) as sealed:
        assert runner.manifest is None
        assert (runner.labels, runner.scores) == (known.labels, known.scores)
        assert runner.stated == known.metadata
        np.testing.assert_array_equal(runner.preprocess(pictures), sealed.preprocess(pictures))
        with pytest.raises(ManifestError, match="no manifest with a golden input"):
            runner.selftest()


def test_a_graph_alone_with_metadata_of_another_form_is_refused(tmp_path) -> None:
    props = {**GraphMetadata(target=Target.TENSORRT).props(), "labels": '{"a": 1}'}
    path = alone(classifier(), tmp_path / "m.onnx", **props)
    with pytest.raises(ManifestError, match=r"^m\.onnx, its metadata.labels is {'a': 1}; expected"):
        open_runner(path, providers=["cpu"])


def test_missing_packages_are_told_with_the_line_that_installs_them(monkeypatch) -> None:
    real = importlib.import_module

    def without(name: str) -> object:
        if name == "cuda.bindings.driver":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(opening.importlib, "import_module", without)
    with pytest.raises(
        MissingPackageError, match=r"^cuda-bindings is not installed; pip install 'msn-export\[rtx"
    ):
        opening.load_cuda("tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("onnxruntime",):
        monkeypatch.delitem(sys.modules, f"msn_export.runtime.{name}", raising=False)
    with pytest.raises(MissingPackageError, match=r"onnxruntime cannot be imported .*\[ort\]'"):
        open_runner(classifier())


def test_the_manifest_is_json_that_says_what_would_rebuild_it() -> None:
    told = json.loads(manifest_path(engine()).read_text())
    assert told["source"]["file"] == "m.onnx"
    assert told["golden"]["output"] == "logits"
