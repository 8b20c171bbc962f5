"""The OpenVINO runner: numbers, precision as executed, outputs, order, threads, errors."""

import gc
import importlib.metadata
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from msn_export import manifest as manifests
from msn_export.errors import (
    DeviceError,
    GraphError,
    InputError,
    ManifestError,
    MissingPackageError,
    RunnerError,
)
from msn_export.graph import io
from msn_export.manifest import manifest_path
from msn_export.metrics.tolerances import GATES
from msn_export.runtime import open_runner
from msn_export.runtime import openvino as subject
from msn_export.runtime.openvino import OpenVinoOptions, OpenVinoRunner
from msn_export.runtime.runner import Precision
from msn_export.spec import Dtype
from msn_export.version_table import Client, table
from tests.builders.artifacts import classifier, copy_of, rewrite
from tests.builders.graphs import parse
from tests.builders.networks import Network, compute

NETWORK = Network()
HAS_BF16 = "BF16" in subject.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="the processor has no bf16")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Write a graph without a manifest, of a network that is computed by hand."""
    return NETWORK.graph(tmp_path_factory.mktemp("plain") / "m.onnx")


@pytest.fixture(scope="module")
def int8(tmp_path_factory, photographs) -> Path:
    """Quantise the tiny classifier."""
    from tests.builders.artifacts import run

    output = tmp_path_factory.mktemp("int8") / "int8.onnx"
    given = ["--int8", "--no-compile", "--smooth", "off", "--images", str(photographs)]
    graph = classifier("--target", "onnxruntime")
    run("calibrate", str(graph), "-o", str(output), "--gate-cosine", "0.5", *given)
    return output


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def opened(path: Path, **options: object) -> OpenVinoRunner:
    runner = open_runner(path, providers=["openvino"], **options)
    assert isinstance(runner, OpenVinoRunner)
    return runner


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


# numbers


@pytest.mark.parametrize(
    "options",
    [(), ("--target", "onnxruntime"), ("--target", "portable"), ("--input", "uint8"),
     ("--dtype", "fp16"), ("--head", "tokens", "--head", "logits"), ("--batch", "4")],
)  # fmt: skip
def test_it_gives_what_onnxruntime_gives_and_passes_the_selftest(options) -> None:
    path = classifier(*options)
    with opened(path) as runner, open_runner(path, providers=["cpu"]) as other:
        assert runner.name == f"OpenVINO {subject.VERSION}, CPU"
        assert runner.inputs == other.inputs
        assert [one.name for one in runner.outputs] == [one.name for one in other.outputs]
        assert (runner.batch, runner.labels) == (other.batch, other.labels)
        images = draw(5)
        if runner.inputs[0].dtype == "uint8":
            images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
        found, wanted = runner(images), other(images)
        for name, values in wanted.items():
            # fp16: OpenVINO computes it in fp32 and onnxruntime rounds each value, 2**-11
            assert relative(found[name], values) < (2e-3 if "fp16" in options else 1e-5)
        assert runner.selftest().passed


@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_any_number_of_images_is_run(plain, count) -> None:
    with opened(plain) as runner:
        for name, values in compute(NETWORK, NETWORK.images(count)).items():
            np.testing.assert_array_equal(runner(NETWORK.images(count))[name], values)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_fixed_batch_is_padded_and_split(tmp_path, count) -> None:
    network = Network(profiles=((4, 4, 4),), is_static=True)
    runner = opened(network.graph(tmp_path / "m.onnx"))
    images = network.images(count)
    for name, values in compute(network, images).items():
        np.testing.assert_array_equal(runner(images)[name], values)
        (mapped,) = runner.map([images])
        np.testing.assert_array_equal(mapped[name], values)


def test_the_batch_is_bounded_by_the_manifest() -> None:
    with opened(classifier()) as runner:
        assert str(runner.batch) == "1:8:32"
        whole = runner(draw(40)).logits
        parts = [runner(draw(40)[:32]).logits, runner(draw(40)[32:]).logits]
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_threads_hints_and_the_order_of_a_batch_change_no_number() -> None:
    images = draw(6)
    with opened(classifier(), threads=1) as runner:
        wanted = runner(images).logits
        np.testing.assert_array_equal(runner(images[::-1]).logits[::-1], wanted)
    for options in ({"threads": 2}, {"hint": "throughput"}, {"hint": "throughput", "threads": 2}):
        with opened(classifier(), **options) as runner:
            np.testing.assert_array_equal(runner(images).logits, wanted)


# outputs


def test_outputs_are_the_callers_and_no_later_call_writes_them(plain) -> None:
    with opened(plain) as runner:
        first = runner(NETWORK.images(3)).embedding
        kept = first.copy()
        runner(NETWORK.images(3, seed=1))
        list(runner.map([NETWORK.images(3, seed=2)] * 3))
        np.testing.assert_array_equal(first, kept)
        assert first.flags.writeable
        assert first.base is None
    np.testing.assert_array_equal(first, kept)


def test_images_are_not_written_and_may_be_read_only_or_strided(plain) -> None:
    images = NETWORK.images(6)
    images.flags.writeable = False
    with opened(plain) as runner:
        wanted = compute(NETWORK, images)["embedding"]
        np.testing.assert_array_equal(runner(images).embedding, wanted)
        np.testing.assert_array_equal(runner(images[::2]).embedding, wanted[::2])
        np.testing.assert_array_equal(runner(np.asfortranarray(images)).embedding, wanted)


def test_tensors_of_the_host_come_back_as_their_kind(plain) -> None:
    images = NETWORK.images(6)
    with opened(plain) as runner:
        output = runner(torch.from_numpy(images)).embedding
    assert isinstance(output, torch.Tensor)
    np.testing.assert_array_equal(output.numpy(), compute(NETWORK, images)["embedding"])


def test_bfloat16_comes_and_goes_as_bfloat16_of_torch_and_as_float32_of_numpy(tmp_path) -> None:
    network = Network(outputs=(("embedding", "bfloat16", 8),))
    wanted = compute(Network(outputs=(("embedding", "float", 8),)), network.images(5))["embedding"]
    runner = opened(network.graph(tmp_path / "m.onnx"))
    output = runner(torch.from_numpy(network.images(5))).embedding
    assert output.dtype is torch.bfloat16
    np.testing.assert_array_equal(output.float().numpy(), wanted)
    assert runner(network.images(5)).embedding.dtype == np.float32
    np.testing.assert_array_equal(runner(network.images(5)).embedding, wanted)
    text = "g (bfloat16[b,4] x) => (float[b,4] y) { y = Cast <to = 1> (x) }"
    io.save(parse(text), tmp_path / "in.onnx")
    given = torch.arange(8).reshape(2, 4).bfloat16()
    np.testing.assert_array_equal(opened(tmp_path / "in.onnx")(given).y, given.float().numpy())


# several batches at a time


def test_batches_under_way_give_what_single_calls_give_in_their_order() -> None:
    batches = [draw(1 + seed % 5, seed) for seed in range(12)]
    with opened(classifier(), hint="throughput") as runner:
        alone = [runner(images).logits for images in batches]
        for found, wanted in zip(runner.map(iter(batches)), alone, strict=True):
            np.testing.assert_array_equal(found.logits, wanted)


def test_no_more_batches_are_taken_than_there_are_streams_and_one(plain) -> None:
    taken: list[int] = []

    def batches():
        for number in range(50):
            taken.append(number)
            yield NETWORK.images(1, number)

    with opened(plain, hint="throughput") as runner:
        for done, outputs in enumerate(runner.map(batches())):
            wanted = compute(NETWORK, NETWORK.images(1, done))["embedding"]
            np.testing.assert_array_equal(outputs.embedding, wanted)
            assert len(taken) <= done + runner._ahead + 1
    assert len(taken) == 50


def test_a_batch_that_fails_is_an_error_where_its_outputs_are_due(tmp_path) -> None:
    text = """g (float[b,4] x) => (float[3,4] y) <float[3,4] w = {1,1,1,1,1,1,1,1,1,1,1,1}>
    { y = Add (x, w) }"""
    io.save(parse(text), tmp_path / "m.onnx")
    runner = opened(tmp_path / "m.onnx")
    three, two = np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)
    rows = runner.map([three, two, three])
    assert next(rows).y.shape == (3, 4)
    with pytest.raises(DeviceError, match="OpenVINO failed on a batch: ") as at:
        next(rows)
    assert "\n" not in str(at.value)
    assert "src/" not in str(at.value)
    with pytest.raises(InputError, match=r"images have shape \[1, 3\]"):
        next(runner.map([np.zeros((1, 3), np.float32)]))
    np.testing.assert_array_equal(runner(three).y, np.ones((3, 4)))


def test_batches_that_nobody_takes_are_waited_for(plain) -> None:
    runner = opened(plain)
    rows = runner.map([NETWORK.images(4)] * 10)
    next(rows)
    rows.close()
    np.testing.assert_array_equal(
        runner(NETWORK.images(2)).embedding, compute(NETWORK, NETWORK.images(2))["embedding"]
    )


def test_every_runner_maps_batches(plain) -> None:
    batches = [NETWORK.images(2, seed) for seed in range(3)]
    with open_runner(plain, providers=["cpu"]) as runner:
        for found, images in zip(runner.map(batches), batches, strict=True):
            np.testing.assert_array_equal(found.embedding, compute(NETWORK, images)["embedding"])


def test_eight_threads_get_the_single_threads_answers(plain) -> None:
    runner = opened(plain)
    batches = [NETWORK.images(1 + seed % 7, seed) for seed in range(50)]
    failures: list[str] = []

    def work(thread: int) -> None:
        for call in range(200):
            images = batches[(thread * 7 + call) % len(batches)]
            if not np.array_equal(runner(images).embedding, compute(NETWORK, images)["embedding"]):
                failures.append(f"thread {thread}, call {call}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# end


def test_a_closed_runner_is_refused_and_closing_again_does_nothing(plain) -> None:
    runner = opened(plain)
    runner.close()
    runner.close()
    for call in (runner, lambda images: next(runner.map([images]))):
        with pytest.raises(RunnerError, match=r"OpenVINO .* is closed; open another"):
            call(NETWORK.images(1))


def test_a_dropped_runner_gives_its_model_back(plain) -> None:
    runner = opened(plain)
    runner(NETWORK.images(1))
    model = weakref.ref(runner._compiled)
    del runner
    gc.collect()
    assert model() is None


# precision


def test_fp32_is_computed_in_fp32_whatever_openvino_would_choose() -> None:
    with opened(classifier()) as runner:
        products, attention = runner.precision.products, runner.precision.attention
        # two blocks of four products, patches and classifier
        assert (set(products), sum(products.values())) == ({"fp32"}, 10)
        assert attention == {"fp32": 2}
        assert str(runner.precision) == "10 of 10 products in fp32, 2 attention in fp32"
        compiled = runner._compiled
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == subject.openvino.Type.f32
        assert str(compiled.get_property("EXECUTION_MODE_HINT")).endswith("ACCURACY")
        assert not compiled.get_property("ENABLE_CPU_PINNING")


def test_quantised_products_run_in_int8(int8) -> None:
    with opened(int8) as runner, open_runner(int8, providers=["cpu"]) as other:
        expected = runner.manifest.quantization.products
        assert runner.precision.quantised == expected == 8
        assert runner.precision.products["int8"] == expected
        assert str(runner.precision).startswith("8 of 8 quantised products in int8, ")
        assert runner.selftest().passed
        # eight bits: where a value falls on the edge of a step, the two round it to either side
        assert relative(runner(draw(5)).logits, other(draw(5)).logits) < 0.1


@needs_bf16
def test_what_an_int8_graph_does_not_quantise_is_computed_in_bf16_where_asked(int8) -> None:
    with opened(int8, precision="bf16") as runner:
        told = str(runner.precision)
    assert told == (
        "8 of 8 quantised products in int8, 2 of 10 products in bf16, 2 attention in bf16"
    )


@needs_bf16
def test_bf16_is_computed_in_bf16_and_held_to_bf16s_gate() -> None:
    path = classifier()
    with opened(path, precision="bf16") as runner, opened(path) as fp32:
        assert runner.name == f"{fp32.name}, bf16"
        assert set(runner.precision.products) == {"bf16"}
        told = runner.selftest()
        assert told.passed, str(told)
        assert (told.gate, told.limit) == (GATES[Dtype.BF16], None)
        assert told.agreement.relative > fp32.selftest().agreement.relative
        # 7 bits of mantissa, 2**-8 a rounding
        assert 1e-4 < relative(runner(draw(5)).logits, fp32(draw(5)).logits) < 5e-2


@needs_bf16
@needs_bf16
def test_bf16_that_is_too_far_off_fails_its_selftest(monkeypatch) -> None:
    runner = opened(classifier(), precision="bf16")
    run = runner._run
    monkeypatch.setattr(runner, "_run", lambda images: [1.1 * one for one in run(images)])
    told = runner.selftest()
    assert not told.passed
    assert "selftest failed (relative error 1.0" in str(told)
    assert "5.0e-02 allowed" in str(told)


def test_another_precision_than_was_asked_for_is_an_error(monkeypatch) -> None:
    coarse = Precision({"bf16": 9, "fp32": 1}, {})
    monkeypatch.setattr(subject, "read_precision", lambda *_: coarse)
    with pytest.raises(RunnerError, match=r"m\.onnx is an fp32 graph, and OpenVINO .* runs 9 of 1"):
        opened(classifier())
    monkeypatch.setattr(subject, "read_precision", lambda *_: Precision({"fp32": 1}, {}))
    monkeypatch.setattr(subject, "_require_precision", lambda *_: None)
    with pytest.raises(RunnerError, match=r"bf16 was asked for, and OpenVINO .* runs 1 of 1 produ"):
        opened(classifier(), precision="bf16")


def test_a_processor_without_bf16_is_told(monkeypatch) -> None:
    core = SimpleNamespace(get_property=lambda *_: ["FP32", "INT8"])
    with pytest.raises(
        RunnerError, match=r"processor has no instructions for bf16 .* leave precis"
    ):
        subject._require_precision(core, Dtype.BF16)
    subject._require_precision(core, Dtype.FP32)


# what it is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"providers": ["openvino", "cpu"]},
            r"OpenVINO runs a graph alone: choose the provider openvino",
        ),
        ({"device": 0}, "device 0 is a GPU, and OpenVINO runs on the CPU; leave it out"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected fp32 or bf16"),
        ({"hint": "fast"}, "hint is 'fast'; expected latency or throughput"),
        (
            {"providers": ["cpu"], "precision": "bf16"},
            r"precision is for OpenVINO: add the provider openvino, or leave precision out",
        ),
        (
            {"providers": None, "hint": "latency"},
            r"hint is for OpenVINO: add the provider openvino, or leave hint out",
        ),
        ({"threads": 0}, "threads is 0; expected a whole number from 1 to 4096"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options, message) -> None:
    with pytest.raises(RunnerError, match=message):
        open_runner(classifier(), **{"providers": ["openvino"], **options})


def test_an_engine_is_not_for_openvino(tmp_path) -> None:
    (tmp_path / "m.engine").write_bytes(b"ftrt")
    with pytest.raises(RunnerError, match="takes no providers; it runs in the TensorRT it is for"):
        open_runner(tmp_path / "m.engine", providers=["openvino"])


def test_options_become_openvinos_properties() -> None:
    asked = OpenVinoOptions.of("bf16", "throughput", 3).config
    assert asked["INFERENCE_PRECISION_HINT"] == "bf16"
    assert asked["PERFORMANCE_HINT"] == "THROUGHPUT"
    assert asked["INFERENCE_NUM_THREADS"] == 3
    assert "INFERENCE_NUM_THREADS" not in OpenVinoOptions.of(None, None, None).config
    with opened(classifier(), threads=1) as runner:
        assert runner._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_openvino_missing_is_told_with_the_line_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "msn_export.runtime.openvino", None)
    with pytest.raises(
        MissingPackageError, match=r"OpenVINO cannot be .*; pip install 'msn-export\[openvino\]'"
    ):
        open_runner(classifier(), providers=["openvino"])


def test_openvino_too_old_for_a_graph_is_told_with_what_takes_it(monkeypatch) -> None:
    monkeypatch.setattr(subject, "VERSION", "2025.4.1")
    least = table()["tensorrt"]["fp32"][Client.OPENVINO].least
    with pytest.raises(
        RunnerError,
        match=rf"m\.onnx needs OpenVINO {least} or later, and here is 2025\.4\.1; upgrade it, or "
        r"export the model with --target portable, which 2025\.4\.1 loads \(pip install -U op",
    ):
        opened(classifier())
    with opened(classifier("--target", "portable")) as runner:
        assert runner.selftest().passed


def test_the_extra_asks_for_an_openvino_that_takes_the_graphs_of_every_target() -> None:
    needed = max(
        Version(row[Client.OPENVINO].least or "0") for of in table().values() for row in of.values()
    )
    (asked,) = {
        one.specifier
        for one in map(Requirement, importlib.metadata.requires("msn-export") or ())
        if one.name == "openvino"
    }
    (floor,) = [Version(one.version) for one in asked if one.operator == ">="]
    assert floor == needed


@pytest.mark.parametrize("bad", [b"nonsense", b""])
def test_a_file_that_is_no_graph_is_refused(tmp_path, bad) -> None:
    (tmp_path / "m.onnx").write_bytes(bad)
    with pytest.raises(GraphError, match=r"m\.onnx is not an ONNX file"):
        opened(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("domain", "operator", "reason"),
    [("nobody", "Unheard", "nobody.Unheard"), ("", "Relu2", "Relu2-23")],
)
def test_a_graph_that_openvino_refuses_is_told_in_one_line(
    tmp_path, capfd, domain, operator, reason
) -> None:
    model = parse("g (float[b,4] x) => (float[b,4] y) { y = Relu (x) }")
    model.graph[0].domain, model.graph[0].op_type = domain, operator
    model.opset_imports[domain] = model.opset_imports.get(domain, 1)
    io.save(model, tmp_path / "m.onnx")
    with pytest.raises(GraphError) as at:
        opened(tmp_path / "m.onnx")
    assert str(at.value) == (
        f"OpenVINO {subject.VERSION} refuses m.onnx: -- No conversion rule found for operations: "
        f"{reason}"
    )
    assert "GraphDef" not in capfd.readouterr().err  # no reader of another format tried it


def test_nothing_is_opened_that_is_not_what_its_manifest_says(tmp_path, monkeypatch) -> None:
    path = copy_of(classifier(), tmp_path)
    monkeypatch.setattr(subject.openvino, "Core", lambda: pytest.fail("a core was made"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ManifestError):
        opened(path)
    path = copy_of(classifier(), tmp_path)
    known = manifests.read(path)
    sealed = manifests.seal(replace(known, kind="engine"))
    manifest_path(path).write_text(sealed)
    with pytest.raises(ManifestError, match="describes no graph"):
        opened(path)


def test_a_graph_alone_is_preprocessed_and_named_as_its_own_file_says(
    tmp_path, photographs
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(classifier().read_bytes())
    picture = sorted(photographs.iterdir())[0]
    with opened(path) as runner, opened(classifier()) as described:
        assert runner.labels == described.labels
        np.testing.assert_array_equal(runner(picture).logits, described(picture).logits)


def test_a_golden_output_that_is_not_reproduced_fails(tmp_path) -> None:
    path = copy_of(classifier(), tmp_path)
    golden = manifests.read(path).golden
    rewrite(path, golden=replace(golden, seed=golden.seed + 1))
    with opened(path) as runner:
        assert not runner.selftest().passed


def test_what_does_not_fit_is_refused(plain) -> None:
    runner = opened(plain)
    images = NETWORK.images(2)
    for bad, message in (
        (images.astype(np.float64), "images are float64; input 'pixel_values' takes float32"),
        (images[0], r"have shape \[3, 2, 2\]; .* give one image as images\[None\]"),
        (images[:0], "there is no image in the batch; give at least one"),
        (5, "images are a int; expected a numpy array or a tensor with DLPack"),
        (np.ma.masked_array(images), "images are a masked array"),
        (OnGpu(images), "images lie on GPU 0; OpenVINO .* takes them from the host"),
    ):
        with pytest.raises(InputError, match=message):
            runner(bad)


class OnGpu:
    """A tensor of the host that says it lies on GPU 0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_a_graph_of_several_inputs_is_refused(tmp_path) -> None:
    text = "g (float[b,4] x, float[b,4] z) => (float[b,4] y) { y = Add (x, z) }"
    io.save(parse(text), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="expected one image input"):
        opened(tmp_path / "m.onnx")


def test_sizes_that_a_graph_of_another_tool_leaves_open_are_open(tmp_path) -> None:
    text = "g (float[b,c,h,w] pixel_values) => (float[b,c,h,w] y) { y = Relu (pixel_values) }"
    io.save(parse(text), tmp_path / "m.onnx")
    runner = opened(tmp_path / "m.onnx")
    for shape in ((2, 3, 4, 5), (1, 1, 8, 8)):
        assert runner(np.ones(shape, np.float32)).y.shape == shape


def test_importing_openvino_reports_nothing_to_its_maker(tmp_path) -> None:
    code = (
        "import sys, msn_export.runtime.openvino; "
        "assert not [n for n in sys.modules if n.startswith('openvino_telemetry')]; "
        "import openvino_telemetry"  # it may be imported afterwards
    )
    environment = {"HOME": str(tmp_path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_runner_needs_neither_onnxruntime_nor_onnx() -> None:
    code = (
        "import sys, msn_export.runtime.openvino; "
        "print(*{n.partition('.')[0] for n in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"onnxruntime", "onnx", "torch", "click", "PIL"} & set(run.stdout.split()) == set()
