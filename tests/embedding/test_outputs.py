"""Finished parts survive any end of the run that wrote them, and serve no other run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from msn_export.embedding import outputs as module
from msn_export.embedding.inference import BEST, Rows
from msn_export.embedding.outputs import Journal
from msn_export.errors import OutputError

ORIGIN = {"model": "abc", "listing": "6 pictures", "preprocessing": {"name": "hf", "mean": (0.5,)}}


@pytest.fixture(autouse=True)
def _each_batch_a_part(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)


def rows(*numbers: float, errors=None) -> Rows:
    vectors = np.asarray(numbers, np.float32)[:, None].repeat(2, axis=1)
    return Rows(vectors, np.zeros((len(numbers), 1), BEST), errors or {})


def begin(tmp_path, *, resume=False, force=False, origin=ORIGIN, total=6) -> Journal:
    return Journal.begin(tmp_path / "parts", total, origin, resume=resume, force=force)


def interrupted(tmp_path) -> None:
    parts = begin(tmp_path)
    parts.add(0, rows(0, 1))
    parts.add(2, rows(2, 3, errors={1: "broken"}))
    parts.close()


def test_hashes_are_kept_with_their_rows_and_asked_for_when_it_goes_on(tmp_path) -> None:
    hashes = np.arange(6 * 32, dtype=np.uint8).reshape(6, 32)
    parts = begin(tmp_path)
    parts.add(0, replace(rows(0, 1), hashes=hashes[:2]))
    parts.close()
    parts = begin(tmp_path, resume=True)
    parts.add(2, replace(rows(2, 3, 4, 5), hashes=hashes[2:]))
    np.testing.assert_array_equal(parts.hashes.read(0, 6), hashes)
    parts.close()
    path = tmp_path / "parts" / "hashes.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match="the arrays have fewer; --force without --resume start"):
        begin(tmp_path, resume=True)


def test_a_run_goes_on_where_another_stopped(tmp_path) -> None:
    interrupted(tmp_path)
    parts = begin(tmp_path, resume=True)
    assert parts.done == 4
    assert parts.errors == {3: "broken"}
    parts.add(4, rows(4, 5))
    np.testing.assert_array_equal(np.load(parts.vectors.path)[:, 0], range(6))
    parts.remove()
    assert not (tmp_path / "parts").exists()


def test_rows_wait_in_memory_until_their_part_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1e9)
    parts = begin(tmp_path)
    parts.add(0, rows(0, 1, errors={0: "broken"}))
    assert (parts.done, parts.broken) == (0, 1)
    monkeypatch.setattr(module, "BYTES", 8 * 4)
    parts.add(2, rows(2, 3))
    assert (parts.done, parts.broken) == (4, 1)


def test_what_a_killed_run_left_unfinished_is_written_again(tmp_path) -> None:
    interrupted(tmp_path)
    folder = tmp_path / "parts"
    with (folder / "vectors.npy").open("ab") as file:
        file.write(b"half a row")
    with (folder / "parts.jsonl").open("a") as file:
        file.write('{"done": 6, "err')
    parts = begin(tmp_path, resume=True)
    assert parts.done == 4
    parts.add(4, rows(4, 5))
    np.testing.assert_array_equal(np.load(parts.vectors.path)[:, 0], range(6))
    parts.close()
    assert begin(tmp_path, resume=True).done == 6


def test_ending_a_part_twice_counts_it_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1e9)
    parts = begin(tmp_path)
    parts.add(0, rows(0, 1))
    note = parts._note

    def interrupt(line):
        note(line)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "_note", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parts.end_part()
    monkeypatch.setattr(parts, "_note", note)
    parts.end_part()
    parts.close()
    assert begin(tmp_path, resume=True).done == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "def"}, "begun with another model (abc, now def)"),
        ({"listing": "7 pictures"}, "begun with another listing (6 pictures, now 7 pictures)"),
        ({"preprocessing": {"name": "msn-eval"}}, "begun with another preprocessing"),
    ],
)
def test_parts_of_another_origin_are_refused(tmp_path, changed, message) -> None:
    interrupted(tmp_path)
    before = (tmp_path / "parts" / "parts.jsonl").read_bytes()
    with pytest.raises(OutputError) as refused:
        begin(tmp_path, resume=True, origin={**ORIGIN, **changed})
    assert message in str(refused.value)
    assert "--force without --resume starts over" in str(refused.value)
    assert (tmp_path / "parts" / "parts.jsonl").read_bytes() == before


def test_without_resume_finished_parts_are_not_thrown_away(tmp_path) -> None:
    interrupted(tmp_path)
    with pytest.raises(OutputError, match=r"holds 4 of 6 rows .* --resume goes on .* --force"):
        begin(tmp_path)
    assert begin(tmp_path, force=True).done == 0


def test_another_run_keeps_its_parts(tmp_path) -> None:
    parts = begin(tmp_path)
    with pytest.raises(OutputError, match=r"another run is writing .*parts"):
        begin(tmp_path, force=True)
    parts.close()


def test_a_folder_that_is_someone_elses_loses_nothing(tmp_path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.txt").write_text("years of work")
    parts = begin(tmp_path, force=True)
    parts.add(0, rows(0, 1, 2, 3, 4, 5))
    parts.remove()
    assert (tmp_path / "parts" / "thesis.txt").read_text() == "years of work"


def _cut_array(folder) -> None:
    path = folder / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-8])


def _garble(folder) -> None:
    path = folder / "parts.jsonl"
    path.write_bytes(b"\x00\xff{\n" + path.read_bytes())


def _other_json(folder) -> None:
    (folder / "parts.jsonl").write_text(json.dumps([1, 2]) + "\n")


def _endless_number(folder) -> None:
    with (folder / "parts.jsonl").open("a") as journal:
        journal.write('{"done": Infinity, "rows": [], "errors": {}}\n')


def _endless_list(folder) -> None:
    with (folder / "parts.jsonl").open("a") as journal:
        journal.write("[" * 100_000 + "\n")


@pytest.mark.parametrize(
    "damage", [_cut_array, _garble, _other_json, _endless_number, _endless_list]
)
def test_damage_is_named_and_nothing_is_built_on_it(tmp_path, damage) -> None:
    interrupted(tmp_path)
    damage(tmp_path / "parts")
    with pytest.raises(OutputError, match=r"is damaged.*--force without --resume starts over"):
        begin(tmp_path, resume=True)
