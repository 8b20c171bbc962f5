"""A manifest is sealed against damage, and belongs to one file."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import msn_export
from msn_export import manifest
from msn_export.errors import ManifestError
from msn_export.input_files import MANIFEST
from msn_export.manifest import Manifest, sha256_of
from msn_export.spec import Dtype
from tests.builders.manifests import example


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "m.engine"
    path.write_bytes(b"an engine")
    write(path, manifest.seal(described(path)))
    return path


def described(path: Path, **changes: object) -> Manifest:
    return example(**{"sha256": sha256_of(path), "bytes": path.stat().st_size, **changes})


def write(artifact: Path, text: str) -> None:
    manifest.manifest_path(artifact).write_text(text, encoding="utf-8")


def reading(artifact: Path) -> str:
    with pytest.raises(ManifestError) as raised:
        manifest.read(artifact)
    return str(raised.value).replace(f"{artifact.parent}{os.sep}", "")


def test_what_was_sealed_is_read(artifact) -> None:
    assert manifest.read(artifact) == described(artifact)
    assert manifest.read(artifact, b"an engine") == described(artifact)


def test_it_is_text_that_a_person_can_read(artifact) -> None:
    text = manifest.manifest_path(artifact).read_text(encoding="utf-8")
    assert '"dög"' in text
    assert text.endswith('"\n}\n')
    assert json.loads(text)["schema"] == 1


@pytest.mark.parametrize("name", ["inputs", "outputs", "profiles"])
def test_one_that_says_nothing_of_its_tensors_is_refused(artifact, name) -> None:
    write(artifact, manifest.seal(example(**{name: ()})))
    assert reading(artifact) == f"m.engine.json: there are no {name}; export the artifact again"


def test_an_artifact_without_one_has_none(tmp_path) -> None:
    assert manifest.read(tmp_path / "m.onnx") is None


def test_another_file_is_not_what_it_describes(artifact) -> None:
    known = described(artifact)
    artifact.write_bytes(b"on engine")
    assert reading(artifact) == (
        f"m.engine is not the file its manifest describes (sha256 {sha256_of(artifact)[:12]}…, "
        f"manifest {known.sha256[:12]}…); put the manifest that was written with it beside it, or "
        "make both again: msn-export trt m.onnx"
    )
    artifact.write_bytes(b"another engine")
    assert reading(artifact).startswith(
        "m.engine is not the file its manifest describes (14 bytes, manifest 9); put"
    )
    write(artifact, manifest.seal(replace(known, bytes=14)))
    assert reading(artifact).startswith("m.engine is not the file its manifest describes (sha256")


def test_bytes_that_were_read_already_are_what_is_verified(artifact) -> None:
    with pytest.raises(ManifestError, match=r"is not the file its manifest describes \(sha256"):
        manifest.read(artifact, b"on engine")
    artifact.unlink()
    assert manifest.read(artifact, b"an engine") is not None


def test_a_manifest_whose_artifact_is_gone_is_read_for_itself_alone(artifact) -> None:
    known = described(artifact)
    artifact.unlink()
    assert reading(artifact) == "m.engine cannot be read: No such file or directory"
    assert manifest.read_unverified(manifest.manifest_path(artifact)) == known


def test_a_changed_figure_breaks_the_seal(artifact) -> None:
    path = manifest.manifest_path(artifact)
    path.write_text(path.read_text().replace('"passed": true', '"passed": false'))
    assert reading(artifact) == (
        "m.engine.json was changed or damaged after it was written (its seal does not fit); "
        "export the artifact again"
    )


@given(st.data())
def test_no_single_changed_character_goes_unseen(data) -> None:
    whole = manifest.seal(example())
    place = data.draw(st.integers(0, len(whole) - 1))
    new = data.draw(st.sampled_from('0123456789abcdef{}[]",: \nx'))
    changed = whole[:place] + new + whole[place + 1 :]
    try:
        plain = json.loads(changed)
    except ValueError:
        return  # no JSON any more: told as such
    if plain == json.loads(whole):
        return  # white space, or the character that was there
    with pytest.raises(ManifestError, match="its seal does not fit"):
        manifest._require_seal(plain, Path("m.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "m.engine.json is not JSON (Expecting value"),
        (b"{", "m.engine.json is not JSON (Expecting property name"),
        (b"\xff", "m.engine.json is not JSON ('utf-8' codec can't decode"),
        (b"[" * 10_000 + b"]" * 10_000, "m.engine.json is not JSON (maximum recursion depth"),
        (b"[" * 992 + b"]" * 992, "m.engine.json "),  # parsed, but too deep to hash again
        (b"{}", "m.engine.json was changed or damaged after it was written"),
        (b"[]", "m.engine.json was changed or damaged after it was written"),
        (b"null", "m.engine.json was changed or damaged after it was written"),
        (b'"' + b" " * MANIFEST.limit + b'"', "m.engine.json is larger than a manifest can be"),
    ],
    ids=["empty", "cut off", "no text", "deep", "nearly deep", "object", "list", "null", "large"],
)
def test_a_file_that_is_none_is_named(artifact, content, message) -> None:
    manifest.manifest_path(artifact).write_bytes(content)
    assert reading(artifact).startswith(message)


def test_a_later_schema_says_to_upgrade(artifact) -> None:
    write(artifact, manifest.seal(example(schema=2)))
    assert reading(artifact) == (
        "m.engine.json has schema 2, this version reads up to 1; upgrade msn-export"
    )


def sealed(**changes: object) -> str:
    """Seal what a forger would write: the seal guards against damage, not against him."""
    plain = json.loads(manifest.seal(example()))
    del plain["seal"]
    plain.update(changes)
    return json.dumps({**plain, "seal": manifest._hash_of(plain)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": "many"}, "m.engine.json.bytes is 'many'; expected int"),
        ({"kind": "zip"}, "m.engine.json.kind is 'zip'; expected one of ('onnx', 'engine')"),
        ({"dtype": "fp4"}, "m.engine.json.dtype is 'fp4', which is no Dtype"),
        ({"trusted": True}, "m.engine.json.trusted is unknown to this version"),
        (
            {"profiles": [{"min": 9, "opt": 1, "max": 1}]},
            "m.engine.json.profiles[0]: batch range 9:1:1 is not ordered",
        ),
        (
            {"inputs": [{"name": "x", "dtype": "float", "shape": [1.5]}]},
            "m.engine.json.inputs[0].shape[0] is 1.5; expected int | str",
        ),
        ({"seconds": float("nan")}, "m.engine.json.seconds is nan; expected a finite number"),
        ({"schema": None}, "m.engine.json.schema is None; expected int"),
    ],
)
def test_what_is_sealed_and_wrong_is_named(artifact, changes, message) -> None:
    write(artifact, sealed(**changes))
    assert reading(artifact).startswith(message)


def test_a_hostile_preprocessing_cannot_ask_for_a_huge_picture(artifact) -> None:
    preprocessing = json.loads(manifest.seal(example()))["preprocessing"]
    write(artifact, sealed(preprocessing={**preprocessing, "short_side": 10**9}))
    assert reading(artifact) == (
        "m.engine.json.preprocessing: short side 1000000000 is out of range; expected 1 to 16384"
    )


def test_a_path_that_is_no_text_can_be_sealed(artifact) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write(artifact, manifest.seal(described(artifact, notes=(f"skipped: {name}",))))
    read = manifest.read(artifact)
    assert read is not None
    assert read.notes == ("skipped: caf\ufffd",)


def test_versions_are_those_that_are_installed() -> None:
    found = manifest.versions_of("numpy", "no-such-package")
    assert found.keys() == {"msn-export", "numpy"}
    assert found["numpy"][0].isdigit()


@pytest.mark.parametrize(
    ("dtype", "options", "gate"),
    [
        (Dtype.FP32, {}, Dtype.FP32),
        (Dtype.FP32, {"tf32": True}, Dtype.FP16),
        (Dtype.BF16, {"tf32": True}, Dtype.BF16),
        (Dtype.INT8, {"tf32": True}, Dtype.INT8),
    ],
)
def test_an_engine_is_judged_by_what_it_multiplies_in(dtype, options, gate) -> None:
    described = example(dtype=dtype)
    assert described.engine is not None
    engine = replace(described.engine, options=options)
    assert replace(described, engine=engine).rounds_as is gate
    assert replace(described, engine=None).rounds_as is dtype


def test_half_of_a_surrogate_pair_is_no_text(artifact) -> None:
    plain = json.loads(manifest.seal(described(artifact)))
    del plain["seal"]
    plain["labels"] = ["cat \ud800"]
    sealed = {**plain, "seal": manifest._hash_of(plain)}
    write(artifact, json.dumps(sealed))
    assert reading(artifact).startswith("m.engine.json is not JSON ('utf-8' codec can't encode")
    plain["labels"] = ["cat \U0001f408"]
    sealed = {**plain, "seal": manifest._hash_of(plain)}
    write(artifact, json.dumps(sealed))  # a whole pair, as ASCII spells it
    read = manifest.read(artifact)
    assert read is not None
    assert read.labels == ("cat \U0001f408",)


def test_none_is_quoted_before_it_was_verified() -> None:
    package = Path(msn_export.__file__).parent
    unverified = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "read_unverified" in path.read_text()
    }
    assert unverified == {"manifest.py", "compare/inspection.py"}  # one given without its artifact
