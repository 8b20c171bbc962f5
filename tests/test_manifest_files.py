"""A manifest lies beside its artifact and names it by hash."""

import hashlib
import time
from pathlib import Path

from msn_export import manifest
from msn_export.manifest import manifest_path, sha256_of


def test_a_manifest_is_named_after_the_whole_file_name() -> None:
    assert manifest_path(Path("m.tar.gz")) == Path("m.tar.gz.json")


def test_a_hash_is_that_of_the_bytes(tmp_path) -> None:
    (tmp_path / "m").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "m") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_file_that_stays_as_it_is_is_read_once(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"abc")
    read: list[Path] = []
    real = manifest._hash
    monkeypatch.setattr(manifest, "_hash", lambda path: read.append(path) or real(path))
    fresh = [sha256_of(path), sha256_of(path)]
    assert len(read) == 2  # it may change again within a tick of the clock
    later = time.time_ns() + 3 * 10**9
    monkeypatch.setattr(manifest.time, "time_ns", lambda: later)
    assert [sha256_of(path) for _ in range(3)] == [fresh[0]] * 3
    assert len(read) == 3


def test_a_file_that_was_written_again_is_hashed_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(manifest, "_SETTLED", -(10**12))  # as long after each write
    path = tmp_path / "m"
    path.write_bytes(b"abc")
    assert sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
    time.sleep(0.02)  # more than a tick
    path.write_bytes(b"abd")
    assert sha256_of(path) == hashlib.sha256(b"abd").hexdigest()
