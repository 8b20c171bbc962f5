"""Outputs are a mapping, and attributes."""

import copy
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from msn_export.errors import InputError
from msn_export.runtime import Outputs
from msn_export.runtime import dlpack as library


def test_by_name_and_by_attribute() -> None:
    outputs = Outputs({"embedding": np.zeros((2, 4)), "keys": np.ones((2, 1))})
    assert outputs.embedding is outputs["embedding"]
    assert list(outputs.keys()) == ["embedding", "keys"]  # the method, not the output
    assert outputs["keys"][0] == 1
    assert len(outputs) == 2
    assert "embedding" in dir(outputs)
    assert repr(outputs) == "Outputs(embedding [2, 4], keys [2, 1])"
    first, second = outputs.values()
    assert first.shape == (2, 4)
    assert second.shape == (2, 1)


def test_what_is_not_there_is_told_with_what_is() -> None:
    outputs = Outputs({"embedding": 1, "logits": 2})
    with pytest.raises(AttributeError, match="no output 'tokens'; there is embedding, logits"):
        _ = outputs.tokens
    with pytest.raises(KeyError, match="no output 'tokens'; there is embedding, logits"):
        outputs["tokens"]
    assert outputs.get("tokens") is None
    assert not hasattr(outputs, "tokens")


def test_it_is_copied_and_pickled() -> None:
    outputs = Outputs({"embedding": np.arange(3)})
    for again in (copy.copy(outputs), pickle.loads(pickle.dumps(outputs))):  # noqa: S301  ours
        np.testing.assert_array_equal(again.embedding, [0, 1, 2])


# the kind that comes back


def test_a_subclass_of_a_librarys_tensor_comes_back_as_its_tensor() -> None:
    kind = type("Mine", (torch.Tensor,), {"__module__": "mine"})
    given = torch.ones(2).as_subclass(kind)
    assert isinstance(library.take_back(given)(np.ones(2)), torch.Tensor)


def test_the_array_api_names_the_namespace() -> None:
    class Array:
        def __array_namespace__(self):
            return types.SimpleNamespace(from_dlpack=lambda made: ("taken", made))

    assert library.take_back(Array())(1) == ("taken", 1)


def test_a_library_that_takes_nothing_gets_what_the_runner_has() -> None:
    assert library.take_back(object())(1) == 1


def test_streams_of_every_library_are_numbers() -> None:
    for stream in (
        7,
        types.SimpleNamespace(cuda_stream=7),
        types.SimpleNamespace(ptr=7),
        types.SimpleNamespace(__cuda_stream__=lambda: (0, 7)),
    ):
        assert library.handle_of(stream) == 7
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    assert library.handle_of(driver.CUstream(7)) == 7
    assert library.handle_of(0) == library.handle_of(driver.CUstream(0)) == library.LEGACY


@pytest.mark.parametrize("stream", ["a stream", None, object(), types.SimpleNamespace(ptr="x")])
def test_what_is_no_stream_is_told(stream) -> None:
    kind = type(stream).__name__
    with pytest.raises(InputError, match=f"^stream is a {kind}; expected a CUDA stream as a numb"):
        library.handle_of(stream)


def test_only_objects_of_a_library_own_their_stream() -> None:
    own = types.SimpleNamespace(ptr=7)
    external = type("ExternalStream", (), {"ptr": 7})()
    assert library.owner_of(own) is own
    assert library.owner_of(external) is None
    assert library.owner_of(7) is None
    assert library.owner_of(0) is not None  # the legacy default stream is always there


@pytest.mark.parametrize("name", sorted(library.CURRENT_STREAM))
def test_a_librarys_current_stream_is_asked_for(monkeypatch, name) -> None:
    stream = types.SimpleNamespace(cuda_stream=9, ptr=9)
    cuda = types.SimpleNamespace(
        current_stream=lambda device: stream, get_current_stream=lambda device: stream
    )
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(cuda=cuda))
    tensor = type("Tensor", (), {"__module__": f"{name}.deep"})()
    assert library.current_stream(tensor, 0) is stream
    assert library.current_stream(object(), 0) is None


@pytest.mark.parametrize("name", sorted(library.FINISH))
def test_a_library_is_told_to_finish(monkeypatch, name) -> None:
    waited: list[object] = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.append("its stream"))
    cuda = types.SimpleNamespace(
        current_stream=lambda device: stream, get_current_stream=lambda device: stream
    )
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(cuda=cuda))
    members = {
        "__module__": f"{name}.deep",
        "block_until_ready": lambda self: waited.append("its stream"),
    }
    tensor = type("Tensor", (), members)()
    library.finish(tensor, 0)
    assert waited == ["its stream"]
    named = types.SimpleNamespace(synchronize=lambda: waited.append("the stream named"))
    library.finish(tensor, 0, named)
    assert waited == ["its stream", "the stream named", "its stream"]
    library.finish(object(), 0, 7)  # a number and an unknown library: nothing to ask
    assert len(waited) == 3
