"""One engine of vit-msn-small in fp16, as a service runs it: sizes, threads, tensors, memory."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from msn_export.errors import RunnerError
from msn_export.metrics.metrics import Comparison
from msn_export.runtime import open_runner, opening
from msn_export.runtime.versions import LoadedTensorRT
from msn_export.spec import Dtype
from tests.fakes.recorder import Recorder
from tests.gpu.places import BARE, CARD, TINY, Place

EVERYWHERE = pytest.mark.parametrize(
    ("place", "shape"),
    [("rehearsal", TINY), pytest.param("card", "vit-msn-small", marks=pytest.mark.gpu)],
    indirect=["place"],
)
ON_A_CARD = pytest.mark.parametrize("place", [CARD], indirect=True)


def pixels(place: Place, shape: str, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Draw normalised planes."""
    height, width = place.checkpoint(shape).config.image_size
    noise = np.random.default_rng(seed).standard_normal((count, 3, height, width))
    return noise.astype(np.float32)


@EVERYWHERE
@pytest.mark.parametrize("count", [1, 2, 7, 8, 15, 16, 17, 40])
def test_an_image_gives_the_same_embedding_in_a_batch_of_any_size(place, shape, count) -> None:
    images = pixels(place, shape, count)
    with place.open(place.build(shape, Dtype.FP16)) as runner:
        together = runner(images).embedding
        alone = np.concatenate([runner(images[i : i + 1]).embedding for i in range(count)])
    assert together.shape == alone.shape
    # kernels differ by batch size, and with them the order of additions in half precision
    comparison = Comparison()
    comparison.add(alone, together)
    assert comparison.agreement().cosine_min > 0.9999


@EVERYWHERE
def test_eight_threads_get_what_one_gets(place, shape) -> None:
    batches = [pixels(place, shape, 1 + seed % 4, seed) for seed in range(8)]
    wrong: list[int] = []
    with place.open(place.build(shape, Dtype.FP16)) as runner:
        wanted = [runner(images).embedding for images in batches]

        def work(number: int) -> None:
            for turn in range(100):
                index = (number + turn) % len(batches)
                if not np.array_equal(runner(batches[index]).embedding, wanted[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@EVERYWHERE
def test_torch_tensors_come_back_as_torch_tensors_where_they_were(place, shape) -> None:
    images = pixels(place, shape, 3)
    with place.open(place.build(shape, Dtype.FP16)) as runner:
        output = runner(torch.from_numpy(images).to(place.torch_device)).embedding
        assert isinstance(output, torch.Tensor)
        assert output.device.type == place.torch_device
        np.testing.assert_array_equal(output.cpu().numpy(), runner(images).embedding)


@ON_A_CARD
def test_cuda_graphs_on_and_off_give_the_same_bytes(place) -> None:
    built = place.build("vit-msn-small", Dtype.FP16)
    with place.open(built) as replayed, place.open(built, cuda_graphs=False) as launched:
        for count in (1, 3, 8, 16):
            for seed in range(4):  # run, captured, replayed twice
                images = pixels(place, "vit-msn-small", count, seed)
                for name, output in replayed(images).items():
                    np.testing.assert_array_equal(output, launched(images)[name])
        assert replayed.cuda_graphs in {"4 captured", "TensorRT-RTX's own"}
        assert launched.cuda_graphs == "off"


@ON_A_CARD
def test_tensors_on_the_card_are_read_and_written_where_they_lie(place, monkeypatch) -> None:
    recorder = Recorder()
    load, load_cuda = opening.load, opening.load_cuda

    def watched(*arguments: Any, **options: Any) -> LoadedTensorRT:
        found = load(*arguments, **options)
        return LoadedTensorRT(recorder.tensorrt(found.trt), found.row, found.version)

    monkeypatch.setattr(opening, "load", watched)
    monkeypatch.setattr(opening, "load_cuda", lambda name: recorder.cuda(load_cuda(name)))
    given = torch.from_numpy(pixels(place, "vit-msn-small", 8)).cuda()
    with place.open(place.build("vit-msn-small", Dtype.FP16), cuda_graphs=False) as runner:
        outputs = runner(given)
        assert given.data_ptr() in recorder.addresses
        for output in outputs.values():
            assert output.data_ptr() in recorder.addresses
        copies = [name for name in recorder.calls if name.startswith("cuMemcpy")]
        assert copies == []
        assert recorder.count("cuMemHostAlloc") == 0


@ON_A_CARD
def test_ten_thousand_calls_hold_no_more_of_the_cards_memory(place) -> None:
    images = pixels(place, "vit-msn-small", 2)
    given = torch.from_numpy(images).cuda()
    with place.open(place.build("vit-msn-small", Dtype.FP16)) as runner:
        for _ in range(500):  # what CUDA and TensorRT keep for later, they have by then
            runner(images)
            runner(given)
        torch.cuda.synchronize()
        before, _ = torch.cuda.mem_get_info()
        for _ in range(5_000):
            runner(images)
            runner(given)
        torch.cuda.synchronize()
        after, _ = torch.cuda.mem_get_info()
    assert before - after < 16 << 20, f"{(before - after) >> 20} MiB grew"


@pytest.mark.parametrize("place", [BARE], indirect=True)
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnxruntime_on_the_card_gives_what_the_cpu_gives(place, provider) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    wanted = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    if wanted not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {wanted}")
    master = place.master("vit-msn-small")
    images = pixels(place, "vit-msn-small", 4)
    with open_runner(master, providers=["cpu"]) as cpu:
        exact = cpu(images).embedding
    try:
        opened = open_runner(master, providers=[provider])
    except RunnerError as error:
        if provider == "tensorrt" and "could not load it" in str(error):
            pytest.skip(str(error))  # onnxruntime brings the provider, not TensorRT itself
        raise
    with opened as runner:
        on_host = runner(images).embedding
        on_card = runner(torch.from_numpy(images).cuda()).embedding
    np.testing.assert_allclose(on_host, exact, atol=5e-2)  # products are TF32 there
    np.testing.assert_array_equal(on_card.cpu().numpy(), on_host)
