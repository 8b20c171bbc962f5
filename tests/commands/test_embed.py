"""``msn-export embed``: a folder through a model, a row for each picture."""

import base64
import hashlib
import json
import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageOps
from pyarrow import parquet

from msn_export import golden, images, manifest
from msn_export.commands import embed as embed_place
from msn_export.commands.jobs import OnnxJob
from msn_export.commands.onnx import run_onnx
from msn_export.embedding.inference import Rows
from msn_export.embedding.outputs import Journal
from msn_export.onnx_header import UNSEALED
from msn_export.preprocessing import assumed
from msn_export.runtime import Runner, open_runner
from msn_export.schema import from_plain
from msn_export.spec import ImageSize
from tests.builders.artifacts import alone
from tests.builders.checkpoints import hugging_face
from tests.builders.embeds import BROKEN, COUNT, embed, is_broken, lines_of, names
from tests.builders.tiny_artifacts import classifier, foreign, pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("embed"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, BROKEN)


@pytest.fixture(scope="module")
def wanted(model, folder):
    """What the model gives for each good picture, run alone: embedding, logits."""
    known = manifest.read(model)
    assert known is not None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = {}
    for name in names(folder):
        if not is_broken(name):
            feed = images.preprocess([folder / name], known.preprocessing)
            embedding, logits = session.run(["embedding", "logits"], {"pixel_values": feed})
            found[name] = embedding[0], logits[0]
    return found


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_several_labels_and_vectors_of_norm_1_are_kept_if_asked_for(
    model, folder, wanted, tmp_path, ending
) -> None:
    output = tmp_path / f"out.{ending}"
    result = embed(model, folder / "*" / "*.png", output, "--top-k", "3", "--normalize")
    assert result.exit_code == 0, result.output
    rows = lines_of(output) if ending == "npy" else parquet.read_table(output).to_pylist()
    vectors = np.load(output) if ending == "npy" else [row["embedding"] for row in rows]
    assert [row["path"] for row in rows] == names(folder)  # the pattern matches all
    for row, vector in zip(rows, vectors, strict=True):
        if row["error"] is not None:
            assert row.get("labels") is None
            continue
        embedding, logits = wanted[row["path"]]
        np.testing.assert_allclose(vector, embedding / np.linalg.norm(embedding), atol=1e-6)
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        order = np.argsort(-logits)[:3]
        assert row["labels"] == [f"class {index}" for index in order]
        assert row["scores"] == pytest.approx(softmax[order], abs=1e-5)
        assert (row["label"], row["score"]) == (row["labels"][0], row["scores"][0])


def test_labels_of_a_model_without_logits_are_refused(folder, tmp_path) -> None:
    graph = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"features": 3})
    result = embed(graph, folder, tmp_path / "o.npy", "--top-k", "3")
    assert result.exit_code == 1
    assert "error: --top-k keeps labels, and m.onnx has no logits; leave it out" in result.output


def test_npy_holds_a_row_for_each_path_in_order(model, folder, wanted, tmp_path) -> None:
    output = tmp_path / "out.npy"
    result = embed(model, folder, output, "--json")
    assert result.exit_code == 0, result.output
    vectors = np.load(output)
    lines = lines_of(tmp_path / "out.npy")
    assert vectors.dtype == np.float32
    assert vectors.shape == (COUNT, 64)
    assert [line["path"] for line in lines] == names(folder)
    assert [line["row"] for line in lines] == list(range(COUNT))
    for line, vector in zip(lines, vectors, strict=True):
        if is_broken(line["path"]):
            assert f"{folder / line['path']} is not a readable picture" in line["error"]
            assert np.isnan(vector).all()
            assert "label" not in line
            continue
        embedding, logits = wanted[line["path"]]
        assert line["error"] is None
        np.testing.assert_allclose(vector, embedding, atol=1e-5)  # batches of 4 round differently
        assert line["label"] == f"class {logits.argmax()}"
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert line["probability"] == pytest.approx(softmax.max(), abs=1e-5)
        assert line["score"] == line["probability"]
    told = json.loads(result.stdout)
    assert (told["images"], told["broken"], told["shape"]) == (COUNT, 2, [COUNT, 64])
    assert told["output_name"] == "embedding"
    about = json.loads((tmp_path / "out.npy.json").read_text())
    assert about["model"] == manifest.read(model).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out.npy", "out.npy.json", "out.npy.rows.jsonl"]
    )


def test_no_number_depends_on_how_many_threads_compute(
    model, folder, tmp_path, monkeypatch
) -> None:
    asked = []

    def opened(*arguments: Any, **options: Any) -> Runner:
        asked.append(options["threads"])
        return open_runner(*arguments, **options)

    monkeypatch.setattr(embed_place, "open_runner", opened)
    for threads in ("1", "3"):
        result = embed(model, folder, tmp_path / f"{threads}.npy", "--threads", threads)
        assert result.exit_code == 0, result.output
    assert asked == [1, 3]
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "3.npy").read_bytes()


def test_parquet_holds_the_same(model, folder, tmp_path) -> None:
    for name in ("out.npy", "out.parquet"):
        assert embed(model, folder, tmp_path / name).exit_code == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "root": "string",
        "path": "string",
        "bytes": "int64",
        "changed": "timestamp[us, tz=UTC]",
        "sha256": "string",
        "embedding": "fixed_size_list<element: float>[64]",
        "error": "string",
        "label": "string",
        "score": "float",
        "probability": "float",
    }
    vectors = np.load(tmp_path / "out.npy")
    lines = lines_of(tmp_path / "out.npy")
    for row, line, vector in zip(table.to_pylist(), lines, vectors, strict=True):
        assert row["path"] == line["path"]
        assert row["error"] == line["error"]
        assert row["bytes"] == line["bytes"] == (folder / row["path"]).stat().st_size
        changed = int((folder / row["path"]).stat().st_mtime_ns) // 1000
        assert round(row["changed"].timestamp() * 1e6) == changed
        assert line["changed"] == row["changed"].isoformat()
        assert row["root"] == str(folder.absolute())
        content = Path(row["root"], row["path"]).read_bytes()
        digest = None if is_broken(row["path"]) else hashlib.sha256(content).hexdigest()
        assert row["sha256"] == line["sha256"] == digest
        assert row["label"] == line.get("label")
        if row["error"] is None:
            np.testing.assert_array_equal(np.asarray(row["embedding"], np.float32), vector)
            for name in ("score", "probability"):
                assert np.float32(row[name]) == np.float32(line[name])
        else:
            assert row["embedding"] is None
    about = json.loads(table.schema.metadata[b"msn-export"])
    assert about["folder"] == str(folder)
    assert about["broken"] == 2
    assert about["preprocessing"]["name"] == "hf"
    assert about["scores"] == "softmax"


@pytest.mark.parametrize(
    ("problem", "labels", "kind"),
    [
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "raw"),
        (None, 1, "sigmoid"),
        ("single_label_classification", 3, "softmax"),
    ],
)
def test_scores_follow_the_problem_type_from_the_checkpoint_to_the_rows(
    folder, tmp_path, problem, labels, kind
) -> None:
    hugging_face(tmp_path / "hf", labels=labels, problem_type=problem)
    _, known = run_onnx(OnnxJob(str(tmp_path / "hf"), tmp_path / "m.onnx", check=False))
    assert known.scores == kind
    for ending in ("npy", "parquet"):
        output = tmp_path / f"out.{ending}"
        result = embed(tmp_path / "m.onnx", folder, output, "--json")
        assert json.loads(result.stdout)["scores"] == kind
    logits = np.load(tmp_path / "out.npy").astype(np.float64)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for line, row, values in zip(lines_of(tmp_path / "out.npy"), table, logits, strict=True):
        if line["error"] is not None:
            continue
        powers = np.exp(values)
        wanted = {"sigmoid": 1 / (1 + 1 / powers), "raw": values, "softmax": powers / powers.sum()}
        assert line["score"] == pytest.approx(wanted[kind].max(), rel=1e-5)
        assert line["probability"] == (None if kind == "raw" else line["score"])
        for name in ("label", "score", "probability"):
            assert row[name] == line[name] or np.float32(row[name]) == np.float32(line[name])


def test_batches_do_not_depend_on_who_is_broken(model, folder, tmp_path) -> None:
    mended = tmp_path / "mended"
    pictures(mended, COUNT)
    for name in ("out.npy", "mended.npy"):
        source = folder if name == "out.npy" else mended
        assert embed(model, source, tmp_path / name).exit_code == 0
    good = [index for index, name in enumerate(names(folder)) if not is_broken(name)]
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy")[good], np.load(tmp_path / "mended.npy")[good]
    )


def test_uint8_and_fp16_models_are_fed_what_they_take(folder, wanted, tmp_path) -> None:
    model = classifier(tmp_path / "m", "--input", "uint8", "--dtype", "fp16", heads=("cls",))
    output = tmp_path / "out.npy"
    assert embed(model, folder, output).exit_code == 0
    for name, vector in zip(names(folder), np.load(output), strict=True):
        if not is_broken(name):
            embedding = wanted[name][0]
            cosine = vector @ embedding / np.linalg.norm(vector) / np.linalg.norm(embedding)
            assert cosine > 0.999  # the gate of an fp16 graph
    lines = lines_of(tmp_path / "out.npy")
    assert set(lines[0]) == {"row", "path", "bytes", "changed", "sha256", "error"}  # no classifier


def test_file_names_that_are_no_text_do_not_stop_it(model, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 2)
    good = (folder / "a" / "000.png").read_bytes()
    for name in (b"caf\xe9.png", b"new\nline.png"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(good)
    for name in ("out.npy", "out.parquet"):
        result = embed(model, folder, tmp_path / name)
        assert result.exit_code == 0, result.output
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["path"].to_pylist()[2:] == ["caf\\xe9.png", "new\nline.png"]


def test_a_graph_of_another_tool_runs_with_a_note(folder, tmp_path) -> None:
    model = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"features": 6})
    result = embed(model, folder, tmp_path / "out.npy", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["notes"] == list(assumed(ImageSize(32, 32)).notes)
    assert told["preprocessing"]["assumed"] is True
    assert told["output_name"] == "features"


def test_what_a_chosen_file_says_and_is_not_read_is_noted(model, folder, tmp_path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"size": 32, "zoom": 2, "resample": "bicubic"}))
    options = ("--preprocess", str(tmp_path / "own.json"), "--json")
    told = json.loads(embed(model, folder, tmp_path / "out.npy", *options).stdout)
    assert told["notes"] == [
        "own.json: not used, as unknown here: 'zoom'",
        "own.json: resample 'bicubic' is text, which transformers reads as bilinear; Pillow's "
        "codes are 2 for bilinear, 3 for bicubic",
    ]


def test_numbers_that_are_none_are_errors(tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    from PIL import Image

    Image.new("RGB", (40, 40)).save(folder / "dark.png")
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    model = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"features": 6}, bad=True)
    assert embed(model, folder, tmp_path / "out.npy").exit_code == 0
    lines = lines_of(tmp_path / "out.npy")
    told = {line["path"]: line["error"] for line in lines}
    assert told["white.png"] is None
    assert told["dark.png"] == "the model's features has NaN or infinity"


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
def test_a_broken_picture_may_have_any_name(model, tmp_path, ending) -> None:
    folder = pictures(tmp_path / "pictures", 2)
    (folder / "caf\udce9.png").write_bytes(b"nothing")  # as Python reads a latin-1 name
    output = tmp_path / f"out{ending}"
    result = embed(model, folder, output)
    assert result.exit_code == 0, result.output
    if ending == ".npy":
        errors = [line["error"] for line in lines_of(output)]
    else:
        errors = parquet.read_table(output)["error"].to_pylist()
    assert errors[:2] == [None, None]
    assert "caf\ufffd.png is not a readable picture" in errors[2]


def test_a_machine_that_computes_something_else_is_noticed_first(model, folder, tmp_path) -> None:
    known = manifest.read(model)
    assert known is not None
    assert known.golden is not None
    values = golden.values_of(known.golden)[:, ::-1].copy()
    text = base64.b64encode(values.tobytes()).decode("ascii")
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    changed = replace(known, golden=replace(known.golden, values=text))
    (tmp_path / "other.onnx.json").write_text(manifest.seal(changed))
    result = embed(other, folder, tmp_path / "out.npy")
    assert result.exit_code == 1
    assert "selftest failed" in result.stderr
    assert "run it all the same with --no-check" in result.stderr
    result = embed(other, folder, tmp_path / "out.npy", "--no-check", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["selftest"] == "none (--no-check)"
    result = embed(model, folder, tmp_path / "out.npy", "--force", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["selftest"].startswith("selftest passed")


def test_phone_pictures_hidden_ones_and_what_cannot_be_read_are_counted(model, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(next(folder.rglob("*.png"))) as plain:
        plain.convert("RGB").save(folder / "phone.png", exif=exif)
        ImageOps.exif_transpose(Image.open(folder / "phone.png")).save(folder / "upright.png")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "phone.png", folder / ".ipynb_checkpoints" / "phone-checkpoint.png")
    (folder / "notes.txt").write_text("no picture")
    skipped = {"hidden": 1, "no picture": 1}

    result = embed(model, folder, tmp_path / "out.npy", "--json")
    told = json.loads(result.stdout)
    assert (told["images"], told["exif"], told["turned"]) == (5, "apply", 1)
    assert told["skipped"] == skipped
    about = json.loads((tmp_path / "out.npy.json").read_text())
    assert (about["turned"], about["skipped"]) == (1, skipped)
    assert about["preprocessing"]["exif"] == "apply"
    rows = [line["path"] for line in lines_of(tmp_path / "out.npy")]
    vectors = np.load(tmp_path / "out.npy")
    phone, upright = (vectors[rows.index(name)] for name in ("phone.png", "upright.png"))
    np.testing.assert_allclose(phone, upright, atol=1e-6)

    result = embed(model, folder, tmp_path / "ignored.npy", "--json", "--exif", "ignore")
    told = json.loads(result.stdout)
    assert (told["exif"], told["turned"]) == ("ignore", 0)
    ignored = np.load(tmp_path / "ignored.npy")[rows.index("phone.png")]
    assert np.abs(ignored - upright).max() > 1e-3

    shown = embed(model, folder, tmp_path / "again.parquet").stdout
    assert "1 of 5 pictures by their EXIF orientation" in shown
    assert "1 hidden" in shown
    metadata = parquet.read_schema(tmp_path / "again.parquet").metadata[b"msn-export"]
    assert json.loads(metadata)["skipped"] == skipped


def test_a_graph_without_its_manifest_is_read_as_its_own_file_says(model, tmp_path) -> None:
    lone, folder = alone(model, tmp_path / "lone.onnx"), pictures(tmp_path / "pictures", 5)
    assert embed(model, folder, tmp_path / "sealed.parquet").exit_code == 0
    result = embed(lone, folder, tmp_path / "lone.parquet", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["notes"][0] == UNSEALED
    rows, sealed = (parquet.read_table(tmp_path / f"{n}.parquet") for n in ("lone", "sealed"))
    assert rows == sealed  # the labels' names too


def test_a_manifest_without_exif_is_of_a_model_whose_pictures_were_not_turned(
    model, tmp_path
) -> None:
    copy = alone(model, tmp_path / "old.onnx", product="")  # nor did files say it themselves
    plain = json.loads(manifest.manifest_path(model).read_text())
    plain |= {"bytes": copy.stat().st_size, "sha256": manifest.sha256_of(copy)}
    assert plain["preprocessing"].pop("exif") == "apply"
    del plain["seal"], plain["preprocessing"]["assumed"], plain["preprocessing"]["squash"]
    known = from_plain(manifest.Manifest, plain, "old")
    assert known.preprocessing.exif == "ignore"
    manifest.manifest_path(copy).write_text(manifest.seal(known))
    result = embed(copy, pictures(tmp_path / "pictures", 2), tmp_path / "out.npy", "--json")
    assert json.loads(result.stdout)["exif"] == "ignore"


def test_turned_pictures_are_counted_over_an_interruption(tmp_path) -> None:
    rows = Rows(np.zeros((2, 3), np.float32), None, {}, 1)
    origin = {"model": "m"}
    parts = Journal.begin(tmp_path / "p", 4, origin, resume=False, force=False)
    with closing(parts):
        parts.add(0, rows)
        parts.end_part()
    with closing(Journal.begin(tmp_path / "p", 4, origin, resume=True, force=False)) as parts:
        assert parts.turned == 1
        parts.add(2, rows)
        parts.end_part()
        assert parts.turned == 2
