"""The onnxruntime runner: what it takes, what it gives, threads, the providers it opens."""

import sys
import threading

import numpy as np
import onnxruntime
import pytest
import torch

from msn_export.errors import DeviceError, GraphError, InputError, RunnerError
from msn_export.graph import io
from msn_export.runtime import dlpack, open_runner
from msn_export.runtime import onnxruntime as subject
from msn_export.runtime.onnxruntime import OrtRunner, open_session
from msn_export.runtime.providers import CPU, CUDA
from tests.builders.artifacts import alone, classifier
from tests.builders.graphs import parse
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import one_device

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


def test_a_torch_tensor_stored_negated_gives_what_the_resolved_one_does(plain) -> None:
    runner = OrtRunner(plain)
    given = torch._neg_view(torch.from_numpy(NETWORK.images(6)))
    np.testing.assert_array_equal(
        runner(given).embedding.numpy(), runner(given.resolve_neg()).embedding.numpy()
    )
    np.testing.assert_array_equal(
        runner(given).embedding.numpy(), compute(NETWORK, -NETWORK.images(6))["embedding"]
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
        (5, "images are a int; expected a numpy array or a tensor with DLPack"),
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


def refusal(monkeypatch, path, version: str, text: str) -> str:
    """Open a graph in an onnxruntime of a version that refuses it with a text."""

    def refuse(*_given: object, **_named: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(subject.onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(subject.onnxruntime, "__version__", version)
    with pytest.raises(GraphError) as raised:
        open_runner(path, providers=["cpu"])
    return str(raised.value)


LATE = (
    "[ONNXRuntimeError] : 1 : FAIL : ONNX Runtime only *guarantees* support for models stamped "
    "with official released onnx opset versions. Opset 23 is under development and support for "
    "this is limited. Current official support for domain ai.onnx is till opset 22."
)


def test_an_onnxruntime_too_old_for_a_graph_names_the_one_that_loads_it(monkeypatch) -> None:
    message = (
        "m.onnx needs onnxruntime 1.23.0 or later, and here is 1.22.1; upgrade it, or export the "
        "model with --target portable, which 1.22.1 loads"
    )
    assert refusal(monkeypatch, classifier(), "1.22.1", LATE) == message
    assert refusal(monkeypatch, classifier(), "1.9.0", LATE) == (
        "m.onnx needs onnxruntime 1.23.0 or later, and here is 1.9.0; upgrade it"
    )


def test_so_does_one_without_its_manifest(monkeypatch, tmp_path) -> None:
    lone = alone(classifier(), tmp_path / "lone.onnx")
    message = refusal(monkeypatch, lone, "1.22.1", LATE)
    assert message.startswith("lone.onnx needs onnxruntime 1.23.0 or later, and here is 1.22.1")


def test_of_another_tools_graph_the_opsets_are_named(monkeypatch, tmp_path) -> None:
    theirs = alone(classifier(), tmp_path / "theirs.onnx", product="")
    assert refusal(monkeypatch, theirs, "1.22.1", LATE) == (
        "theirs.onnx is of opset 23, and onnxruntime 1.22.1 knows those to 22; install a later "
        "onnxruntime, or export it for an earlier opset"
    )
    assert refusal(monkeypatch, theirs, "1.23.0", "no kernel\nfor Unheard") == (
        "onnxruntime refuses theirs.onnx: no kernel for Unheard"
    )


def test_what_a_new_onnxruntime_refuses_is_not_put_down_to_its_age(monkeypatch) -> None:
    message = refusal(monkeypatch, classifier(), "1.31.1", "no kernel for Unheard")
    assert message == "onnxruntime refuses m.onnx: no kernel for Unheard"


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


def test_a_further_stream_cannot_keep_onnxruntimes_outputs(plain, monkeypatch) -> None:
    with OrtRunner(plain) as runner:
        runner(NETWORK.images(2)).record_stream(7)  # on the host it is not needed
        monkeypatch.setattr(runner, "_run_bound", lambda _images: {"embedding": None})
        images = NETWORK.images(2)
        on_gpu = dlpack.Tensor(images.ctypes.data, images.shape, dlpack.OF_ONNX["float"], 0, images)
        with pytest.raises(RunnerError, match=r"^onnxruntime frees .*; wait for the stream \("):
            runner(on_gpu).record_stream(7)


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


def test_a_runner_that_is_closed_while_images_are_read_is_refused(plain) -> None:
    runner = OrtRunner(plain)

    class Closing:
        def __init__(self, images: np.ndarray) -> None:
            self.images = images

        def __dlpack__(self, **_options: object) -> object:
            runner.close()
            return self.images.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(RunnerError, match="is closed; open another"):
        runner(Closing(NETWORK.images(1)))


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


GEMM, FP8 = "node gemm_input_reshape: no", "Type 'tensor(float8e4m3fn)' of input is invalid"


@pytest.mark.parametrize(
    ("refusals", "disabled", "qdq"),
    [([GEMM], ["MatMulAddFusion"], ""), ([FP8], [], "1"), ([FP8, GEMM], ["MatMulAddFusion"], "1")],
)
def test_a_graph_that_onnxruntime_spoils_itself_is_opened_again_on_the_same_providers(
    tmp_path, monkeypatch, refusals, disabled, qdq
) -> None:
    given: list[tuple[object, dict[str, object]]] = []

    def session(path: str, options: object, **told: object) -> str:
        given.append((options, told))
        if len(given) <= len(refusals):
            raise RuntimeError(refusals[len(given) - 1])
        return path

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    asked = [(CPU, {"arena_extend_strategy": "kSameAsRequested"})]
    assert open_session(tmp_path / "m.onnx", asked, 3) == str(tmp_path / "m.onnx")
    assert len(given) == len(refusals) + 1
    assert [told["providers"] for _, told in given] == [asked] * len(given)
    assert [told["enable_fallback"] for _, told in given] == [0] * len(given)
    assert given[0][1]["disabled_optimizers"] == []
    options, last = given[-1]
    assert last["disabled_optimizers"] == disabled
    assert options.intra_op_num_threads == 3
    if qdq:
        assert options.get_session_config_entry("session.disable_quant_qdq") == qdq


def test_a_call_that_fails_is_not_run_again_on_the_cpu() -> None:
    """onnxruntime would make another session on the CPU, and print that on stdout."""
    with open_runner(classifier(), providers=["cpu"]) as runner:
        assert runner._session._enable_fallback is False


# providers


CARD = one_device()
BOTH = ("TensorrtExecutionProvider", CUDA, CPU)


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
