"""transformers.js, optimum and a browser run a folder of ``hub``, and agree with transformers."""

import functools
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import clients
import numpy as np
import onnxruntime
import pytest
from clients import CLIENTS, TESTED
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoImageProcessor, ViTMSNForImageClassification, ViTMSNModel

import msn_export
from msn_export.hub_folder import GRAPHS
from msn_export.reporting.hub_card import JS_DTYPES
from msn_export.spec import Dtype
from tests.builders.checkpoints import hugging_face, processor
from tests.fakes.browser import chromium

pytestmark = pytest.mark.slow

# Of the worst picture, with transformers. What int8 costs was judged when it was made, on pictures
# that were held out: here a client has to give what the same file gives in onnxruntime.
LEAST = {Dtype.FP32: 0.9999, Dtype.FP16: 0.999, Dtype.INT8: 0.999}
JS = [("transformers.js", TESTED["transformers.js"]), ("transformers.js", "3.8.1")]
CLASSIFIES, EXTRACTS = "image-classification", "image-feature-extraction"


@pytest.fixture(scope="module")
def at_size(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photographs of the models' size: no client has to resize them."""
    folder = tmp_path_factory.mktemp("at-size")
    for path in sorted(photographs.iterdir()):
        # an ICC profile, which transformers.js and browsers apply and Pillow does not, is left out
        pixels = np.asarray(Image.open(path).convert("RGB").resize((64, 64)))
        Image.fromarray(pixels).save(folder / f"{path.stem}.png")
    return sorted(folder.iterdir())


Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A classifier's checkpoint and its folder with all graphs, and those of an encoder."""
    root, made = tmp_path_factory.mktemp("hub"), {}
    for name, labels in (("classifier", 8), ("encoder", 0)):
        checkpoint, folder = root / f"{name}-checkpoint", root / name
        hugging_face(checkpoint, labels=labels, image_size=64, patch_size=16, hidden_size=128,
                     num_attention_heads=4, num_hidden_layers=4)  # fmt: skip
        processor(checkpoint, image_processor_type="ViTImageProcessor",
                  size={"height": 64, "width": 64}, image_mean=[0.485, 0.456, 0.406],
                  image_std=[0.229, 0.224, 0.225])  # fmt: skip
        msn_export.hub(checkpoint, folder, images=photographs)
        made[name] = (checkpoint, folder)
    return made


def expected(kind: type, checkpoint: Path, pictures: list[Path]) -> np.ndarray:
    """Run transformers on the checkpoint itself: logits, or the last hidden state."""
    made = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    opened = [Image.open(path).convert("RGB") for path in pictures]
    found = kind.from_pretrained(checkpoint).eval()(**made(opened, return_tensors="pt"))
    name = "logits" if kind is ViTMSNForImageClassification else "last_hidden_state"
    return found[name].detach().numpy().reshape(len(pictures), -1)


def expected_logits(places: tuple[Path, Path], dtype: Dtype, pictures: list[Path]) -> np.ndarray:
    """Run transformers, or for int8 the folder's own file in onnxruntime."""
    checkpoint, folder = places
    if dtype is not Dtype.INT8:
        return expected(ViTMSNForImageClassification, checkpoint, pictures)
    made = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    opened = [Image.open(path).convert("RGB") for path in pictures]
    session = onnxruntime.InferenceSession(folder / GRAPHS[dtype])
    return session.run(["logits"], dict(made(opened, return_tensors="np")))[0]


def least_cosine(found: np.ndarray, right: np.ndarray) -> float:
    rows = found.reshape(right.shape)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(right, axis=1)
    return float(((rows * right).sum(1) / norms).min())


def in_client(name: str, version: str, folder: Path, pictures: list[Path], *arguments: str):
    client = CLIENTS[name]
    return clients.run_folder(
        client, clients.installed(client, version), folder, pictures, *arguments
    )


@pytest.mark.parametrize(("name", "version"), JS)
@pytest.mark.parametrize("dtype", GRAPHS)
def test_transformers_js_classifies(folders, at_size, name, version, dtype) -> None:
    _, folder = folders["classifier"]
    found = in_client(name, version, folder, at_size, CLASSIFIES, JS_DTYPES[dtype])
    right = expected_logits(folders["classifier"], dtype, at_size)
    assert least_cosine(found["logits"], right) >= LEAST[dtype]
    exponents = np.exp(found["logits"] - found["logits"].max(1, keepdims=True))
    scores = exponents / exponents.sum(1, keepdims=True)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-3)
    if dtype is Dtype.FP32:
        assert (found["scores"].argmax(1) == right.argmax(1)).all()


def test_the_example_in_node_classifies_by_transformers_js(folders, at_size, tmp_path) -> None:
    checkpoint, folder = folders["classifier"]
    client = CLIENTS["transformers.js"]
    example = Path("examples/node_classifier/node_classifier.mjs").absolute()
    project = clients.installed(client, TESTED[client.name])
    own = shutil.copy(example, tmp_path)  # as into a project: Node looks for packages from there
    (tmp_path / "node_modules").symlink_to(project / "node_modules")
    command = ["node", own, folder, at_size[0]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    scores, labels = zip(*(line.split("  ") for line in ran.stdout.splitlines()), strict=True)
    logits = expected(ViTMSNForImageClassification, checkpoint, at_size[:1])[0]
    order = np.argsort(-logits)[:5]
    names = ViTMSNForImageClassification.from_pretrained(checkpoint).config.id2label
    assert list(labels) == [names[index] for index in order.tolist()]
    chances = np.exp(logits - logits.max())
    np.testing.assert_allclose(
        [float(score) for score in scores], (chances / chances.sum())[order], atol=2e-3
    )


@pytest.mark.parametrize(("name", "version"), JS)
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16])
def test_transformers_js_extracts_features(folders, at_size, name, version, dtype) -> None:
    checkpoint, folder = folders["encoder"]
    found = in_client(name, version, folder, at_size, EXTRACTS, JS_DTYPES[dtype])
    right = expected(ViTMSNModel, checkpoint, at_size)
    assert least_cosine(found["last_hidden_state"], right) >= LEAST[dtype]


@pytest.mark.parametrize("dtype", GRAPHS)
def test_optimum_classifies(folders, at_size, dtype) -> None:
    _, folder = folders["classifier"]
    file = Path(GRAPHS[dtype]).name
    found = in_client("optimum", TESTED["optimum"], folder, at_size, CLASSIFIES, file)
    right = expected_logits(folders["classifier"], dtype, at_size)
    assert least_cosine(found["logits"], right) >= LEAST[dtype]


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16])
def test_optimum_extracts_features(folders, at_size, dtype) -> None:
    checkpoint, folder = folders["encoder"]
    file = Path(GRAPHS[dtype]).name
    found = in_client("optimum", TESTED["optimum"], folder, at_size, EXTRACTS, file)
    right = expected(ViTMSNModel, checkpoint, at_size)
    assert least_cosine(found["last_hidden_state"], right) >= LEAST[dtype]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Be quiet."""

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_page_in_a_browser_classifies_a_photograph(folders, at_size, tmp_path) -> None:
    _, folder = folders["classifier"]
    web = CLIENTS["onnxruntime-web"]
    package = clients.installed(web, TESTED[web.name]) / "node_modules/onnxruntime-web"
    shutil.copy(clients.PROGRAMS / "classify.html", tmp_path)
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "ort").symlink_to(package / "dist")
    (tmp_path / "pictures").symlink_to(at_size[0].parent)
    with served(tmp_path) as address, chromium() as browser:
        for number, dtype in ((0, Dtype.FP32), (1, Dtype.FP32), (2, Dtype.FP16), (3, Dtype.INT8)):
            page = f"classify.html?picture=pictures/{at_size[number].name}&file={GRAPHS[dtype]}"
            browser.get(f"{address}/{page}")
            found = WebDriverWait(browser, 120).until(
                lambda opened: opened.execute_script("return window.found")
            )
            assert "error" not in found, found
            right = expected_logits(folders["classifier"], dtype, at_size[number : number + 1])
            assert least_cosine(np.array([found["logits"]]), right) >= LEAST[dtype]
            if dtype is Dtype.FP32:
                assert found["label"] == f"class {right.argmax()}"
                assert browser.find_element("id", "answer").text == found["label"]
