"""A fitted classifier is read back from its graph, whatever was made of that since."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.errors import GraphError
from msn_export.fit_record import FitRecord
from msn_export.graph.classifier import fitted_classifier
from msn_export.manifest import Manifest, SourceRecord, manifest_path, seal, sha256_of
from msn_export.models.config import LinearClassifier
from msn_export.spec import Dtype, Head
from tests.builders.checkpoints import hugging_face
from tests.builders.manifests import fit

ROWS = np.random.default_rng(0).standard_normal((5, 128), np.float32)


def record(**changes: object) -> FitRecord:
    digest = hashlib.sha256(ROWS.tobytes()).hexdigest()
    return fit(**{"weights": digest, "classes": 5, "blocks": 2, **changes})


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A tiny graph whose classifier reads the features of two blocks."""
    folder = tmp_path_factory.mktemp("fitted")
    hugging_face(folder / "checkpoint")
    classifier = LinearClassifier(ROWS, tuple("abcde"), "features", 2)
    job = OnnxJob(
        str(folder / "checkpoint"), folder / "m.onnx", heads=(Head.LOGITS,), classifier=classifier,
        check=False,
    )  # fmt: skip
    output, manifest = run_onnx(job)
    manifest = replace(manifest, fit=record())
    manifest_path(output).write_text(seal(manifest))
    return output, manifest


def test_it_is_found_by_its_hash(graph) -> None:
    found = fitted_classifier(*graph)
    np.testing.assert_array_equal(found.weight, ROWS)
    assert found.weight.flags.writeable
    assert (found.labels, found.pooling, found.blocks) == (tuple("abcde"), "features", 2)


def test_embedding_reads_the_final_layer_norms_cls(graph) -> None:
    path, manifest = graph
    other = replace(manifest, fit=record(features="embedding"))
    assert fitted_classifier(path, other).pooling == "cls"


def made_from(graph: Path, path: Path, manifest: Manifest, **changes: object) -> Manifest:
    """Describe a file that was made from a graph."""
    source = SourceRecord(graph.name, sha256_of(graph))
    made = replace(
        manifest, output=path.name, sha256=sha256_of(path), bytes=path.stat().st_size,
        source=source, **changes,
    )  # fmt: skip
    manifest_path(path).write_text(seal(made))
    return made


def test_an_engine_of_a_typed_graph_finds_it_in_the_first_graph(graph, tmp_path) -> None:
    path, manifest = graph
    first = tmp_path / "m.onnx"
    first.write_bytes(path.read_bytes())
    manifest_path(first).write_bytes(manifest_path(path).read_bytes())
    typed, engine = tmp_path / "half.onnx", tmp_path / "m.engine"
    half = OnnxJob(
        str(path.parent / "checkpoint"), typed, heads=(Head.LOGITS,), dtype=Dtype.FP16,
        islands="none", check=False,
        classifier=LinearClassifier(ROWS, tuple("abcde"), "features", 2),
    )  # fmt: skip
    run_onnx(half)
    made_from(first, typed, manifest, dtype=Dtype.FP16)
    engine.write_bytes(b"an engine")
    last = made_from(typed, engine, manifest, kind="engine")
    np.testing.assert_array_equal(fitted_classifier(engine, last).weight, ROWS)
    first.unlink()
    with pytest.raises(GraphError) as error:
        fitted_classifier(engine, last)
    assert str(error.value) == (
        f"{engine} has a classifier that was fitted on digits, which the checkpoint does not have, "
        "and the fp32 graph that msn-export fit wrote is not beside it; put it there, or compare "
        "with that graph"
    )


def test_a_file_of_that_name_that_is_another_is_not_read(graph, tmp_path) -> None:
    path, manifest = graph
    other, engine = tmp_path / "m.onnx", tmp_path / "m.engine"
    other.write_bytes(path.read_bytes() + b"\0")
    engine.write_bytes(b"an engine")
    made = made_from(path, engine, manifest, kind="engine")
    with pytest.raises(GraphError, match="is not beside it"):
        fitted_classifier(engine, made)


def test_weights_of_another_hash_are_no_classifier(graph) -> None:
    path, manifest = graph
    with pytest.raises(GraphError, match="is not beside it"):
        fitted_classifier(path, replace(manifest, fit=record(weights="00" * 32)))
