"""A manifest lies beside its artifact and names it by hash."""

import hashlib
from pathlib import Path

from msn_export.sidecar import manifest_path, sha256_of


def test_a_manifest_is_named_after_the_whole_file_name() -> None:
    assert manifest_path(Path("m.tar.gz")) == Path("m.tar.gz.json")


def test_a_hash_is_that_of_the_bytes(tmp_path) -> None:
    (tmp_path / "m").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "m") == hashlib.sha256(b"abc" * 100_000).hexdigest()
