"""An artifact is sent with its manifest, and is a file again where it arrives."""

import pytest

from msn_export.cluster.storage import pack, unpacked
from msn_export.errors import RunnerError


@pytest.fixture
def artifact(tmp_path):
    path = tmp_path / "here/model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"a graph")
    path.with_name("model.onnx.json").write_text("{}")
    return path


def test_on_a_machine_without_it_it_is_written_for_as_long_as_it_is_opened(artifact) -> None:
    cargo = pack(artifact)
    artifact.rename(artifact.with_name("elsewhere"))
    with unpacked(cargo) as path:
        assert path.parent != artifact.parent
        assert path.name == "model.onnx"
        assert path.read_bytes() == b"a graph"
        assert path.with_name("model.onnx.json").read_text() == "{}"
    assert not path.parent.exists()


def test_where_the_same_file_lies_it_is_that_one(artifact) -> None:
    with unpacked(pack(artifact)) as path:
        assert path == artifact


def test_another_file_of_the_same_path_is_not_taken_for_it(artifact) -> None:
    cargo = pack(artifact)
    artifact.write_bytes(b"another")
    with unpacked(cargo) as path:
        assert path != artifact
        assert path.read_bytes() == b"a graph"


def test_a_model_without_a_manifest_is_sent_without(artifact) -> None:
    artifact.with_name("model.onnx.json").unlink()
    cargo = pack(artifact)
    artifact.unlink()
    with unpacked(cargo) as path:
        assert [one.name for one in path.parent.iterdir()] == ["model.onnx"]


def test_a_model_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(RunnerError) as refused:
        pack(tmp_path / "no.onnx")
    assert str(refused.value) == (
        f"{tmp_path}/no.onnx does not exist; give an .onnx file or an engine"
    )
