"""What a manifest says of a fitted classifier survives JSON, and is one line for people."""

import json
from dataclasses import replace

import pytest

from msn_export.errors import ManifestError
from msn_export.fit_record import FitRecord
from msn_export.manifest import Manifest, read_unverified, seal
from msn_export.schema import from_plain, to_plain
from tests.builders.manifests import example, fit


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    for record in (fit(), fit(accuracy=None, unmeasured="one image", relative=None, same=None)):
        manifest = example(fit=record)
        (tmp_path / "m.json").write_text(seal(manifest))
        assert read_unverified(tmp_path / "m.json") == manifest


def test_a_manifest_without_one_is_read() -> None:
    plain = to_plain(example())
    del plain["fit"]
    assert from_plain(Manifest, json.loads(json.dumps(plain)), "m.json").fit is None


def test_features_of_another_kind_are_refused() -> None:
    plain = {**to_plain(fit()), "features": "pixels"}
    with pytest.raises(ManifestError, match=r"m.json.features is 'pixels'; expected one of"):
        from_plain(FitRecord, plain, "m.json")


def test_the_sentence_has_the_accuracy_or_says_that_there_is_none() -> None:
    assert fit().sentence == (
        "3 classes fitted on msn features of 50 images of digits, C 400; 90.0% of 30 images right: "
        "the images not drawn"
    )
    other = replace(fit(blocks=4, features="embedding", C=0.4), accuracy=None)
    assert other.sentence == (
        "3 classes fitted on embedding features of 4 blocks of 50 images of digits, C 0.4; "
        "accuracy not measured"
    )
