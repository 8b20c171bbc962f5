"""What a replica answers, and which arguments an application takes; without Ray."""

import asyncio
import io
import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_export import image_folder, images, runtime
from msn_export.cluster import replica as module
from msn_export.cluster.replica import Replica, Serving
from msn_export.errors import ImageError, SpecError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize
from tests.builders.foreign import OPTIMUM, Reading, scripted
from tests.builders.foreign import classifier as other_tools_classifier
from tests.builders.tiny_artifacts import classifier, foreign, pictures

NAMED = {"model": "m.onnx"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return classifier(tmp_path_factory.mktemp("model"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def replica(model):
    with closing(Replica(Serving(model, providers=("cpu",)))) as opened:
        yield opened


def test_arguments_come_as_texts_or_as_a_configuration_has_them() -> None:
    texts = {"model": "/m/vit.onnx", "replicas": "2", "wait": "0", "providers": "cuda,cpu"}
    wanted = Serving(Path("/m/vit.onnx"), replicas=2, wait=0, providers=("cuda", "cpu"))
    assert Serving.of(texts) == wanted
    values = {**texts, "replicas": 2, "wait": 0, "providers": ["cuda", "cpu"]}
    assert Serving.of(values) == wanted


def test_a_relative_model_is_found_from_where_it_was_named(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Serving.of({"model": "vit.onnx"}).model == tmp_path / "vit.onnx"


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        ({"model": "/m.onnx"}, {"num_cpus": 1}),
        ({"model": "/m.onnx", "cpus": "4"}, {"num_cpus": 4}),
        ({"model": "/m.onnx", "gpus": "1"}, {"num_cpus": 1, "num_gpus": 1}),
        ({"model": "/m.engine"}, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_an_engine_is_given_a_gpu(arguments, share) -> None:
    assert Serving.of(arguments).share == share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "argument 'model' is missing; give model=FILE, an .onnx or an engine"),
        (
            {"modle": "x"},
            "argument 'modle' is none; expected model, replicas, cpus, gpus, batch, wait, "
            "decoders, output, preprocess, exif, providers",
        ),
        ({**NAMED, "replicas": "two"}, "argument replicas=two: expected a whole number from 1 on"),
        ({**NAMED, "replicas": "0"}, "argument replicas=0: expected a whole number from 1 on"),
        ({**NAMED, "wait": "-1"}, "argument wait=-1: expected a whole number from 0 on"),
        ({**NAMED, "cpus": 1.5}, "argument cpus=1.5: expected a whole number from 1 on"),
        ({**NAMED, "batch": True}, "argument batch=True: expected a whole number from 1 on"),
        ({**NAMED, "exif": "never"}, "argument exif=never: expected apply or ignore"),
        (
            {**NAMED, "preprocess": "hff"},
            "preprocessing 'hff' is unknown; expected hf, msn-eval, raw, or a JSON file such as "
            "preprocessor_config.json",
        ),
    ],
)
def test_what_is_no_argument_is_refused(arguments, message) -> None:
    with pytest.raises(SpecError) as refused:
        Serving.of(arguments)
    assert str(refused.value) == message


def test_pictures_that_run_together_get_the_answers_they_get_alone(replica, model, tmp_path):
    paths = image_folder.find(pictures(tmp_path, 3)).paths

    async def decode():
        return await asyncio.gather(*(replica.decode(path.read_bytes()) for path in paths))

    answers = replica.run(asyncio.run(decode()))
    with runtime.open_runner(model, providers=["cpu"]) as runner:
        outputs = runner(runner.preprocess(paths))
        best = [guesses[0] for guesses in runner.top_k(outputs.logits, 1)]
    for answer, vector, guess in zip(answers, outputs.embedding, best, strict=True):
        np.testing.assert_allclose(answer["embedding"], vector, rtol=1e-5, atol=1e-6)
        assert (answer["label"], answer["batch"]) == (guess.label, 3)
        assert answer["probability"] == pytest.approx(guess.probability, abs=1e-6)
        assert answer["score"] == answer["probability"]


def test_pictures_are_made_as_the_arguments_say(model, monkeypatch) -> None:
    folder = model.parent
    (folder / "own.json").write_text(json.dumps({"image_mean": 0.25, "resample": 3}))
    monkeypatch.chdir(folder)
    serving = Serving.of({"model": model, "preprocess": "own.json", "exif": "ignore"})
    monkeypatch.chdir("/")  # a replica's folder is another
    with closing(Replica(replace(serving, providers=("cpu",)))) as opened:
        assert opened.about()["preprocessing"] == (
            "own.json: resized to 32x32 (bicubic), EXIF orientation ignored; scale 1/255, mean "
            "0.25, 0.25, 0.25, std 0.5, 0.5, 0.5"
        )


def test_an_image_size_that_a_graph_leaves_open_is_read_off_its_positions(tmp_path) -> None:
    logits = Reading(other_tools_classifier(), lambda m, x: m(x).logits)
    path = scripted(tmp_path / "theirs.onnx", logits, axes=OPTIMUM)
    with closing(Replica(Serving(path, providers=("cpu",)))) as opened:
        picture = np.zeros((32, 32, 3), np.uint8)
        (answer,) = opened.run([picture])
    assert len(answer["embedding"]) == 3


def test_it_says_what_is_served(replica) -> None:
    about = replica.about()
    assert about["output"] == "embedding"
    assert about["batch"] == 4  # what the model is tuned for
    assert about["labels"] == ["class 0", "class 1", "class 2"]
    assert about["scores"] == "softmax"
    assert about["preprocessing"].startswith("hf (assumed): resized to 32x32 (bilinear), EXIF")
    assert about["selftest"].startswith("selftest passed")


def test_what_is_no_picture_is_refused(replica, monkeypatch) -> None:
    with pytest.raises(ImageError) as refused:
        asyncio.run(replica.decode(b"no picture"))
    assert str(refused.value) == (
        "the posted picture is not a readable picture (cannot identify image file)"
    )
    monkeypatch.setattr(module, "LARGEST", 5)
    with pytest.raises(ImageError) as refused:
        asyncio.run(replica.decode(b"no picture"))
    assert str(refused.value) == "the posted picture has 10 bytes; at most 5"


class Crashing:
    """Decoders of which one died, with what it had begun."""

    def __init__(self, given) -> None:
        self.given, self.alone = given, 0

    def begin(self, posted):
        future: Future = Future()
        future.set_exception(BrokenProcessPool())
        return future

    def once_more(self, posted):
        self.alone += 1
        assert self.alone == 1, "two at a time: one would end the other"
        self.alone -= 1
        return self.given

    def close(self):
        pass


def test_pictures_that_were_with_one_that_ended_their_decoder_are_tried_again(
    replica, monkeypatch
) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(replica, "_decoder", Crashing(images.Fitted(pixels, turned=False)))

    async def decode():
        return await asyncio.gather(*(replica.decode(b"x") for _ in range(4)))

    assert all(one is pixels for one in asyncio.run(decode()))
    monkeypatch.setattr(replica, "_decoder", Crashing("it crashed its decoder"))
    with pytest.raises(ImageError, match="it crashed its decoder"):
        asyncio.run(replica.decode(b"x"))


def test_a_vector_that_is_no_number_is_an_error_and_its_neighbours_are_not(tmp_path) -> None:
    path = foreign(tmp_path / "log.onnx", ["b", 3, 8, 8], {"embedding": 3}, bad=True)
    with closing(Replica(Serving(path, providers=("cpu",)))) as opened:
        assert opened.about()["selftest"] == "none: no golden input came with the model"
        bright, dark = (np.full((8, 8, 3), value, np.uint8) for value in (255, 0))
        good, bad = opened.run([bright, dark])
    assert len(good["embedding"]) == 3
    assert bad == {"error": "the model's embedding has NaN or infinity"}


def test_posted_bytes_are_preprocessed_as_a_file_is(tmp_path) -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    known = preset("hf", ImageSize(32, 32))
    got = module.read_posted(module.Posted(file.getvalue()), preprocessing=known)
    np.testing.assert_array_equal(got.pixels, images.read(tmp_path / "a.png", known))
