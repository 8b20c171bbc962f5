"""The onnxruntime runner: what it takes, what it gives, threads, providers, the selftest."""

import sys
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from artifacts import classifier, copy_of
from graphs import parse
from networks import Network, compute
from trt_bench import one_device

from msn_export import images, manifest
from msn_export.driver import NoDriver
from msn_export.errors import DeviceError, GraphError, InputError, ManifestError, RunnerError
from msn_export.graph import io
from msn_export.runtime import dlpack, open_runner
from msn_export.runtime import ort as subject
from msn_export.runtime.ort import OrtRunner
from msn_export.runtime.providers import CPU, CUDA, choose, require_obtained
from msn_export.runtime.runner import Guess
from msn_export.sidecar import manifest_path

NETWORK = Network()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A graph without a manifest, of a network computed by hand."""
    return NETWORK.graph(tmp_path_factory.mktemp("plain") / "m.onnx")


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def bare(batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(classifier(), providers=[CPU])
    logits: np.ndarray = session.run(None, {"pixel_values": batch})[0]
    return logits


def test_it_gives_what_onnxruntime_gives() -> None:
    with open_runner(classifier(), providers=["cpu"]) as runner:
        assert runner.name == f"onnxruntime {onnxruntime.__version__}, {CPU}"
        assert str(runner.batch) == "1:8:32"
        outputs = runner(draw(5))
        np.testing.assert_array_equal(outputs.logits, bare(draw(5)))
        assert outputs["logits"] is outputs.logits
        assert dict(outputs) == {"logits": outputs.logits}


@pytest.mark.parametrize("count", [32, 33, 70])
def test_a_batch_above_the_largest_is_split(count) -> None:
    with open_runner(classifier()) as runner:
        logits = runner(draw(count)).logits
    parts = [bare(draw(count)[start : start + 32]) for start in range(0, count, 32)]
    np.testing.assert_array_equal(logits, np.concatenate(parts))


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_fixed_batch_is_padded_and_split(tmp_path, count) -> None:
    network = Network(profiles=((4, 4, 4),), is_static=True)
    runner = OrtRunner(network.graph(tmp_path / "m.onnx"))
    batch = network.images(count)
    for name, values in compute(network, batch).items():
        np.testing.assert_array_equal(runner(batch)[name], values)


def test_a_graph_without_a_manifest_is_run_in_one_batch(plain) -> None:
    runner = OrtRunner(plain)
    batch = NETWORK.images(100)
    np.testing.assert_array_equal(runner(batch).odd, compute(NETWORK, batch)["odd"])
    assert runner.batch.max == 65536


def test_tensors_of_the_host_are_read_in_place_and_come_back_as_their_kind(plain) -> None:
    runner = OrtRunner(plain)
    batch = NETWORK.images(6)
    given = torch.from_numpy(batch)
    output = runner(given).embedding
    assert isinstance(output, torch.Tensor)
    np.testing.assert_array_equal(output.numpy(), compute(NETWORK, batch)["embedding"])
    every_second = torch.from_numpy(NETWORK.images(12))[::2]
    np.testing.assert_array_equal(
        runner(every_second).embedding.numpy(),
        compute(NETWORK, every_second.numpy())["embedding"],
    )


def test_bfloat16_travels_by_address(tmp_path) -> None:
    network = Network(outputs=(("embedding", "bfloat16", 8),))
    runner = OrtRunner(network.graph(tmp_path / "m.onnx"))
    same = Network(outputs=(("embedding", "float", 8),))
    batch = network.images(5)
    output = runner(torch.from_numpy(batch)).embedding
    assert output.dtype is torch.bfloat16
    np.testing.assert_array_equal(output.float().numpy(), compute(same, batch)["embedding"])
    widened = runner(batch).embedding  # NumPy cannot name bfloat16
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, compute(same, batch)["embedding"])


def test_a_bfloat16_input_takes_torch_and_names_the_remedy(tmp_path) -> None:
    text = "g (bfloat16[b,4] x) => (float[b,4] y) { y = Cast <to = 1> (x) }"
    io.save(parse(text), tmp_path / "m.onnx")
    runner = OrtRunner(tmp_path / "m.onnx")
    given = torch.arange(8).reshape(2, 4).bfloat16()
    np.testing.assert_array_equal(runner(given).y.numpy(), given.float().numpy())
    with pytest.raises(InputError, match="takes bfloat16; NumPy has no bfloat16, give a torch t"):
        runner(np.zeros((2, 4), np.float32))


def test_what_does_not_fit_is_refused(plain) -> None:
    runner = OrtRunner(plain)
    batch = NETWORK.images(2)
    for bad, message in (
        (batch.astype(np.float64), "images are float64; input 'pixel_values' takes float32"),
        (batch.astype(np.uint8), r"runner\.preprocess\(\) gives what it takes, normalised"),
        (batch[0], r"have shape \[3, 2, 2\]; .* give one image as images\[None\]"),
        (batch[:0], "there is no image in the batch; give at least one"),
        (batch.astype(np.complex64), "images are complex64; expected a plain float"),
        ("m.png", "images are a str; expected a numpy array or a tensor with DLPack"),
        (torch.from_numpy(batch).requires_grad_(), r"require gradient, use tensor\.detach\(\)"),
        (torch.from_numpy(batch).to(torch.complex64), "expected a plain float, integer or bool"),
    ):
        with pytest.raises(InputError, match=message):
            runner(bad)


def test_a_graph_of_something_else_is_refused(tmp_path) -> None:
    text = "g (float[b,4] x, float[b,4] z) => (float[b,4] y) { y = Add (x, z) }"
    io.save(parse(text), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="expected one image input"):
        OrtRunner(tmp_path / "m.onnx")


def test_sizes_that_a_graph_of_another_tool_leaves_open_are_open(tmp_path) -> None:
    text = "g (float[b,c,h,w] pixel_values) => (float[b,c,h,w] y) { y = Relu (pixel_values) }"
    io.save(parse(text), tmp_path / "m.onnx")
    runner = OrtRunner(tmp_path / "m.onnx")
    for shape in ((2, 3, 4, 5), (1, 1, 8, 8)):
        assert runner(np.ones(shape, np.float32)).y.shape == shape
    with pytest.raises(InputError, match=r"have shape \[2, 3\]; .* takes \[b, c, h, w\]"):
        runner(np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match="which has no place before it is computed; give NumPy"):
        runner._run_bound(dlpack.borrow(np.ones((1, 1, 8, 8), np.float32)))


def test_what_fails_inside_onnxruntime_is_our_error(tmp_path) -> None:
    text = """g (float[b,4] x) => (float[3,4] y) <float[3,4] w = {1,1,1,1,1,1,1,1,1,1,1,1}>
    { y = Add (x, w) }"""
    io.save(parse(text), tmp_path / "m.onnx")
    runner = OrtRunner(tmp_path / "m.onnx")
    with pytest.raises(DeviceError, match="onnxruntime failed on a batch: ") as at:
        runner(np.zeros((2, 4), np.float32))
    assert "\n" not in str(at.value)


def test_a_closed_runner_is_refused_and_closing_again_does_nothing(plain) -> None:
    runner = OrtRunner(plain)
    runner.close()
    runner.close()
    for given in (NETWORK.images(1), torch.from_numpy(NETWORK.images(1))):
        with pytest.raises(RunnerError, match="is closed; open another"):
            runner(given)


def test_eight_threads_of_500_calls_get_the_single_threads_answers(plain) -> None:
    runner = OrtRunner(plain)
    batches = [NETWORK.images(1 + seed % 7, seed) for seed in range(50)]
    alone = [runner(batch).embedding for batch in batches]
    failures: list[str] = []

    def work(thread: int) -> None:
        for call in range(500):
            index = (thread * 7 + call) % len(batches)
            if not np.array_equal(runner(batches[index]).embedding, alone[index]):
                failures.append(f"thread {thread}, call {call}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_threads_of_a_call_can_be_set() -> None:
    with open_runner(classifier(), threads=1) as runner:
        assert runner._session.get_session_options().intra_op_num_threads == 1


# providers


CARD, NO_CARD = one_device(), NoDriver("no NVIDIA driver (libcuda.so.1 cannot be loaded)")
BOTH = ("TensorrtExecutionProvider", CUDA, CPU)


@pytest.mark.parametrize(
    ("asked", "device", "available", "driver", "expected"),
    [
        (None, None, BOTH, NO_CARD, [CPU]),
        (None, None, BOTH, CARD, [CUDA]),
        (None, None, (CPU,), CARD, [CPU]),
        (None, 0, BOTH, CARD, [CUDA]),
        (["cpu"], None, BOTH, CARD, [CPU]),
        (["cuda", "cpu"], 0, BOTH, CARD, [CUDA, CPU]),
        (["tensorrt", "cuda"], None, BOTH, CARD, ["TensorrtExecutionProvider", CUDA]),
        ([CUDA], None, BOTH, CARD, [CUDA]),
    ],
)
def test_which_providers_are_opened(asked, device, available, driver, expected) -> None:
    chosen = choose(asked, device, available, driver)
    assert [name for name, _ in chosen] == expected
    assert all(options == ({} if name == CPU else {"device_id": 0}) for name, options in chosen)


@pytest.mark.parametrize(
    ("asked", "device", "available", "driver", "message"),
    [
        (["cuda"], None, BOTH, NO_CARD, "CUDAExecutionProvider was asked for, and here: no NVID"),
        (["cuda"], None, (CPU,), CARD, "has cpu; pip install onnxruntime-gpu instead of onnxru"),
        (["openvino"], None, BOTH, CARD, "has no provider 'openvino'; it has tensorrt, cuda, cpu"),
        ([], None, BOTH, CARD, "no provider is asked for; give one of cpu, cuda"),
        (["cpu"], 0, BOTH, CARD, r"device 0 is a GPU and the providers asked for \(cpu\) use none"),
        (["cuda"], 3, BOTH, CARD, "device 3 does not exist; here are 0: Stand-in GPU"),
        (None, 0, BOTH, NO_CARD, "CUDAExecutionProvider was asked for, and here: no NVIDIA dr"),
    ],
)
def test_a_provider_that_cannot_be_had_is_an_error(
    asked, device, available, driver, message
) -> None:
    with pytest.raises(RunnerError, match=message):
        choose(asked, device, available, driver)


def test_onnxruntime_leaving_a_provider_out_is_an_error(monkeypatch, plain) -> None:
    """Real: where a driver is pretended, onnxruntime tries CUDA, fails, and falls back silently."""
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime knows no CUDA")
    monkeypatch.setattr(subject, "find_driver", lambda: CARD)
    with pytest.raises(
        RunnerError, match=r"m\.onnx: CUDAExecutionProvider was asked for and onnxruntime could no"
    ):
        OrtRunner(plain, ["cuda"])


def test_the_cuda_libraries_are_loaded_before_a_gpus_provider_is_opened(
    monkeypatch, plain, capsys
) -> None:
    loaded: list[str] = []

    def preload() -> None:
        sys.stdout.write("Failed to load libcublas.so.13")  # as onnxruntime does: no result of ours
        loaded.append("CUDA")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    OrtRunner(plain, ["cpu"]).close()
    assert loaded == []
    monkeypatch.setattr(subject, "find_driver", lambda: CARD)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(BOTH))
    with pytest.raises((RunnerError, GraphError)):
        OrtRunner(plain, ["cuda"])
    assert loaded == ["CUDA"]
    assert capsys.readouterr().out == ""


class OnGpu:
    """A tensor of the host that says it lies on GPU 0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_what_a_library_computes_is_waited_for_before_its_address_is_bound(
    monkeypatch, plain
) -> None:
    waited: list[tuple[int, object]] = []
    monkeypatch.setattr(
        subject, "finish", lambda _images, device, stream: waited.append((device, stream))
    )
    with OrtRunner(plain) as runner:
        runner(torch.from_numpy(NETWORK.images(1)))
        assert waited == []  # on the host nothing is late
        runner._device = 0
        with pytest.raises(DeviceError):  # there is no GPU to bind to
            runner(OnGpu(NETWORK.images(1)), stream=7)
    assert waited == [(0, 7)]


def test_obtained_means_every_one() -> None:
    require_obtained([CUDA], [CUDA, CPU], "m.onnx")
    with pytest.raises(RunnerError, match="TensorrtExecutionProvider was asked for"):
        require_obtained(["TensorrtExecutionProvider", CUDA], [CUDA, CPU], "m.onnx")


# what all runners share


def test_pictures_are_preprocessed_as_the_manifest_says(photographs) -> None:
    from PIL import Image

    paths = images.find(photographs)[:3]
    with open_runner(classifier()) as runner:
        known = runner.manifest.preprocessing
        batch = runner.preprocess(paths)
        np.testing.assert_array_equal(batch, images.preprocess(paths, known))
        one = runner.preprocess(str(paths[1]))
        np.testing.assert_array_equal(one, batch[1:2])
        with Image.open(paths[2]) as picture:
            np.testing.assert_array_equal(runner.preprocess(picture), batch[2:])
        assert runner(batch).logits.shape == (3, 3)


def test_a_graph_of_bytes_is_given_bytes(photographs) -> None:
    paths = images.find(photographs)[:2]
    with (
        open_runner(classifier("--input", "uint8")) as of_bytes,
        open_runner(classifier()) as of_floats,
    ):
        batch = of_bytes.preprocess(paths)
        assert batch.dtype == np.uint8
        assert batch.shape == (2, 32, 32, 3)
        np.testing.assert_allclose(
            of_bytes(batch).logits, of_floats(of_floats.preprocess(paths)).logits, atol=1e-3
        )


def test_the_likeliest_labels_come_first() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [1000.0, 0.0, -1000.0]], np.float32)
    with open_runner(classifier()) as runner:
        first, second = runner.top_k(logits, k=2)
        assert [guess.label for guess in first] == ["class 1", "class 2"]
        assert first[0].probability == pytest.approx(np.exp(3) / np.exp([1, 3, 2]).sum())
        assert second[0] == Guess("class 0", 1.0, 0)
        assert [len(row) for row in runner.top_k(logits, k=9)] == [3, 3]
        for bad, k, message in (
            (logits[0], 1, r"logits have shape \[3\] and k is 1; expected \[b, 3\]"),
            (logits[:, :2], 1, r"have shape \[2, 2\]"),
            (logits, 0, "k of at least 1"),
            (logits * np.nan, 1, "logits are not all finite"),
        ):
            with pytest.raises(InputError, match=message):
                runner.top_k(bad, k)


def test_without_a_manifest_labels_are_numbers_and_pictures_are_refused(plain) -> None:
    runner = OrtRunner(plain)
    assert runner.labels == ()
    assert runner.top_k(np.array([[0.0, 1.0]]), 1)[0][0].label == "1"
    with pytest.raises(ManifestError, match="there is no manifest that says how pictures are"):
        runner.preprocess(["a.png"])
    with pytest.raises(ManifestError, match="there is no manifest with a golden input"):
        runner.selftest()


# the selftest


@pytest.mark.parametrize(
    "options", [(), ("--dtype", "fp16"), ("--input", "uint8"), ("--head", "tokens"),
                ("--batch", "4")]
)  # fmt: skip
def test_a_fresh_export_passes_its_selftest(options) -> None:
    with open_runner(classifier(*options)) as runner:
        told = runner.selftest()
    assert told.passed, str(told)
    assert told.agreement.images == 2
    assert told.reference.startswith("torch ")
    assert str(told).startswith("selftest passed: output '")


def test_another_graph_fails_the_selftest_with_its_figures(tmp_path) -> None:
    path = copy_of(classifier(), tmp_path)
    model = io.load(path)
    weights = model.graph.initializers["classifier.weight"]
    import onnx_ir as ir

    weights.const_value = ir.tensor(weights.const_value.numpy() * 1.01, name=weights.name)
    io.save(model, path)
    known = manifest.read(path)
    from msn_export.sidecar import sha256_of

    manifest_path(path).write_text(manifest.seal(replace(known, sha256=sha256_of(path))))
    with open_runner(path) as runner:
        told = runner.selftest()
    assert not told.passed
    assert "selftest failed (max_abs" in str(told)


def test_an_export_without_a_check_has_no_golden_values_and_says_so() -> None:
    with (
        open_runner(classifier("--no-check")) as runner,
        pytest.raises(ManifestError, match=r"m\.onnx has none with a golden input to test with; e"),
    ):
        runner.selftest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": "numpy.random.MT19937"}, "is none this version can draw; upgrade"),
        ({"shape": (2, 9999, 9999, 3)}, "is none this version can draw"),
        ({"shape": (999, 32, 32, 3)}, "golden values cannot be read"),
        ({"seed": -1}, "is none this version can draw"),
        ({"values": "not base64!"}, "golden values cannot be read"),
        ({"values": "AAAA"}, "golden values cannot be read"),
        ({"dim": 7}, "golden values cannot be read"),
        ({"output": "embedding"}, "golden output 'embedding' is none of the artifact's"),
    ],
)
def test_a_hostile_golden_record_is_refused(changes, message) -> None:
    known = manifest.read(classifier())
    with open_runner(classifier()) as runner:
        runner.manifest = replace(known, golden=replace(known.golden, **changes))
        with pytest.raises(ManifestError, match=message):
            runner.selftest()
