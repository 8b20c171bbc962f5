"""An index beside its table: what belongs together is known by hash."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from msn_export.embedding import index as place
from msn_export.embedding.index import IndexRecord, nearest, open_index, read_record, table_of
from msn_export.errors import ManifestError, OutputError
from msn_export.manifest import sha256_of
from msn_export.schema import to_plain
from tests.builders.embeds import embed
from tests.builders.tiny_artifacts import classifier, pictures

COUNT = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    model = classifier(folder)
    result = embed(model, pictures(folder / "set", COUNT, (5,)), folder / "i.usearch")
    assert result.exit_code == 0, result.output
    return folder / "i.usearch"


@pytest.fixture
def index(written: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    for path in written.parent.glob("i.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / written.name


def test_the_side_file_says_what_belongs_together(written) -> None:
    record = read_record(written)
    assert record.model == str(written.with_name("tiny.onnx"))
    assert record.model_sha256 == sha256_of(written.with_name("tiny.onnx"))
    assert record.folder == str(written.with_name("set"))
    assert (record.dim, record.rows, record.indexed) == (64, COUNT, COUNT - 1)
    assert record.index_sha256 == sha256_of(written)
    assert record.table_sha256 == sha256_of(written.with_suffix(".parquet"))
    assert record.output_name == "embedding"


def test_two_runs_write_the_same_bytes(written, tmp_path) -> None:
    again = tmp_path / "i.usearch"
    result = embed(written.with_name("tiny.onnx"), written.with_name("set"), again)
    assert result.exit_code == 0, result.output
    assert again.read_bytes() == written.read_bytes()
    assert table_of(again).read_bytes() == table_of(written).read_bytes()


def test_links_find_what_comparing_all_finds(written, monkeypatch) -> None:
    opened = open_index(written, read_record(written))
    rows = parquet.read_table(table_of(written)).to_pylist()
    vectors = np.array([row["embedding"] for row in rows if row["error"] is None], np.float32)
    exact = nearest(opened, vectors, 3)
    monkeypatch.setattr(place, "EXACT", 0)
    linked = nearest(opened, vectors, 3)
    assert (linked[0] == exact[0]).all()
    assert exact[1][:, 0] == pytest.approx(1, abs=1e-6)
    assert nearest(opened, vectors[:1], 999)[0].shape == (1, COUNT - 1)


@pytest.mark.parametrize("name", ["i.usearch", "i.parquet"])
def test_a_file_that_is_another_or_gone_is_refused(index, name) -> None:
    record, path = read_record(index), index.with_name(name)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(OutputError) as error:
        open_index(index, record)
    assert str(error.value) == f"{path} is not the file that {index}.json names; embed again"
    path.unlink()
    with pytest.raises(OutputError, match=f"{name} does not exist; embed again"):
        open_index(index, record)


def test_a_forged_index_is_refused_before_usearch_opens_it(index) -> None:
    content = bytearray(index.read_bytes())
    head = content.index(b"usearch")
    content[head + 64 + 32] = 255  # the node where a search begins
    index.write_bytes(content)
    record = replace(read_record(index), index_sha256=sha256_of(index))
    with pytest.raises(OutputError, match="is no index that msn-export wrote: "):
        open_index(index, record)


def _written(index: Path, record: IndexRecord, **changes: object) -> None:
    Path(f"{index}.json").write_text(json.dumps({**to_plain(record), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "i.usearch.json.dim is '64'; expected int"),
        ({"more": 1}, "i.usearch.json.more is unknown to this version"),
        ({"schema": 2}, "has schema 2, this version reads 1; upgrade msn-export"),
    ],
)
def test_a_side_file_that_is_none_is_one_line(index, changes, message) -> None:
    _written(index, read_record(index), **changes)
    with pytest.raises(ManifestError) as error:
        read_record(index)
    assert message in str(error.value)


def test_a_side_file_that_is_missing_damaged_or_too_large_is_refused(index) -> None:
    side = Path(f"{index}.json")
    side.write_text("[" * 100_000)
    with pytest.raises(ManifestError, match="is not JSON"):
        read_record(index)
    side.write_text(" " * (2**20 + 1))
    with pytest.raises(ManifestError, match="is larger than a side file can be"):
        read_record(index)
    side.unlink()
    with pytest.raises(ManifestError) as error:
        read_record(index)
    assert str(error.value) == (
        f"{side} is missing: nothing says which model {index} belongs to; embed again"
    )
