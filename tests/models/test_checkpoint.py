"""A checkpoint is found wherever a user keeps it, and the same weights are the same checkpoint."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from msn_export.errors import CheckpointError
from msn_export.models.checkpoint import AS_IT_SAYS, Checkpoint, Choices, load_checkpoint
from msn_export.models.config import VARIANTS, Processor, VitConfig
from tests.builders.checkpoints import hugging_face, original_state, processor
from tests.fakes.hub import COMMIT, cached, serve

State = dict[str, torch.Tensor]
LABELS = ("class 0", "class 1", "class 2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    hugging_face(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    hugging_face(folder, labels=3)
    processor(folder, size=32)
    return folder


def weights_of(folder: Path) -> State:
    state: State = load_file(folder / "model.safetensors")
    return state


def message_of(source: object, choices: Choices = AS_IT_SAYS) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(str(source), choices)
    return str(raised.value)


# --- key styles and formats -----------------------------------------------------------------------


def published(state: State) -> State:
    """facebook/vit-msn-*: the encoder below ``vit.``, transformers < 5."""
    return {
        key if key.startswith("classifier") else f"vit.{bare(key)}": t for key, t in state.items()
    }


def mixed(state: State) -> State:
    """What save_pretrained of a classifier writes: embeddings below ``vit.``, blocks not."""
    return {
        bare(key) if "encoder." in key or "classifier" in key else f"vit.{bare(key)}": t
        for key, t in state.items()
    }


def newer(state: State) -> State:
    """transformers 5: ``vit.layers.N.attention.q_proj``."""
    renames = [
        (r"^(vit\.)?encoder\.layer\.", "layers."),
        (r"attention\.attention\.(q)uery|attention\.attention\.(k)ey|attention\.attention\.(v)alue",
         lambda found: f"attention.{found[1] or found[2] or found[3]}_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(?<=\d)\.output\.dense", ".mlp.fc2"),
    ]  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        for pattern, to in renames:
            key = re.sub(pattern, to, key)  # noqa: PLW2901  one after another
        renamed[key if key.startswith("classifier") else f"vit.{bare(key)}"] = tensor
    return renamed


def bare(key: str) -> str:
    return key.removeprefix("vit.")


STYLES = {"published": published, "mixed": mixed, "newer": newer}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
@pytest.mark.parametrize("labelled", [False, True], ids=["encoder", "classifier"])
def test_every_key_style_is_the_same_checkpoint(
    encoder, classifier, tmp_path, style, labelled
) -> None:
    source = classifier if labelled else encoder
    state = style(weights_of(source))
    assert state.keys() != weights_of(source).keys() or style is mixed
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    got, wanted = load_checkpoint(str(tmp_path)), load_checkpoint(str(source))
    assert got.sha256 == wanted.sha256
    assert got.config == wanted.config
    assert got.config.labels == (LABELS if labelled else ())
    assert got.notes == ()


def test_the_styles_of_these_tests_are_the_ones_that_occur(encoder, classifier) -> None:
    keys = {name: style(weights_of(classifier)).keys() for name, style in STYLES.items()}
    assert "vit.encoder.layer.1.attention.attention.query.weight" in keys["published"]
    assert {"encoder.layer.1.output.dense.bias", "vit.embeddings.cls_token"} <= keys["mixed"]
    assert {"vit.layers.1.attention.q_proj.weight", "vit.layers.0.mlp.fc2.bias"} <= keys["newer"]
    assert all("classifier.weight" in found for found in keys.values())


def test_the_original_repositorys_file_is_the_same_checkpoint(encoder, tmp_path) -> None:
    theirs = hugging_face(tmp_path / "hf")
    state = {f"module.{key}": t for key, t in original_state(theirs, 2).items()}
    torch.save({"target_encoder": state, "epoch": 800}, tmp_path / "vits16.pth.tar")
    shutil.copy(encoder / "config.json", tmp_path)
    got = load_checkpoint(str(tmp_path / "vits16.pth.tar"))
    assert got.sha256 == load_checkpoint(str(encoder)).sha256


def test_our_own_state_dict_is_the_same_checkpoint(classifier, tmp_path) -> None:
    wanted = load_checkpoint(str(classifier))
    save_file(wanted.model.state_dict(), tmp_path / "model.safetensors")
    shutil.copy(classifier / "config.json", tmp_path)
    assert load_checkpoint(str(tmp_path)).sha256 == wanted.sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_and_told(encoder, tmp_path, dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in weights_of(encoder).items()}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(encoder / "config.json", tmp_path)
    got = load_checkpoint(str(tmp_path))
    assert got.model.norm.weight.dtype == torch.float32
    assert got.notes == (f"weights were {str(dtype).removeprefix('torch.')}, read as float32",)
    assert got.sha256 != load_checkpoint(str(encoder)).sha256  # rounded once is other weights


def test_weights_that_torch_saved_negated_are_read_with_their_signs(classifier, tmp_path) -> None:
    state = {name: torch._neg_view(-tensor) for name, tensor in weights_of(classifier).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.load(tmp_path / "pytorch_model.bin")["vit.layernorm.weight"].is_neg()
    shutil.copy(classifier / "config.json", tmp_path)
    assert load_checkpoint(str(tmp_path)).sha256 == load_checkpoint(str(classifier)).sha256


@pytest.mark.parametrize("form", ["bin", "sharded", "sharded bin"])
def test_every_format_of_a_folder_is_the_same_checkpoint(classifier, tmp_path, form) -> None:
    state = weights_of(classifier)
    shutil.copy(classifier / "config.json", tmp_path)
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "sharded":
        hugging_face(tmp_path, labels=3, shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    else:
        names = {key: f"pytorch_model-{i % 2}.bin" for i, key in enumerate(state)}
        for name in set(names.values()):
            torch.save({k: t for k, t in state.items() if names[k] == name}, tmp_path / name)
        index = {"weight_map": names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    got = load_checkpoint(str(tmp_path))
    assert got.sha256 == load_checkpoint(str(classifier)).sha256
    assert got.config.labels == LABELS


# --- a folder, a file -----------------------------------------------------------------------------


def test_a_folder_brings_its_preprocessing_and_its_labels(classifier) -> None:
    got = load_checkpoint(str(classifier))
    assert got.source == str(classifier)
    assert got.processor == Processor("preprocessor_config.json", {"size": 32})
    assert got.config.labels == LABELS


def test_so_does_a_file_with_both_beside_it(classifier) -> None:
    got = load_checkpoint(str(classifier / "model.safetensors"))
    assert got.source == str(classifier / "model.safetensors")
    assert got.processor == Processor("preprocessor_config.json", {"size": 32})
    assert got.config.labels == LABELS


@pytest.fixture(scope="module")
def tiny() -> Iterator[VitConfig]:
    """Publish a sixth shape for as long as these tests run: the five are millions of numbers."""
    config = VitConfig((32, 32), (8, 8), 3, dim=64, depth=2, heads=2, mlp_dim=96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", config)
        yield config


@pytest.fixture(scope="module")
def seeded(tiny: VitConfig) -> Checkpoint:
    return load_checkpoint("random:tiny")


@pytest.fixture(scope="module")
def alone(seeded: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "w.safetensors"
    save_file(seeded.model.state_dict(), path)
    return path


def test_a_file_alone_is_recognised_by_its_shape(alone, tiny) -> None:
    assert load_checkpoint(str(alone)).config == tiny


def test_a_variant_that_is_not_the_files_is_told_by_its_shapes(alone) -> None:
    message = message_of(alone, Choices("vit-msn-base"))
    assert "160 keys missing (" in message
    assert "expected [2304, 768]" in message
    assert message.endswith("; the shape is from --variant vit-msn-base: is it right?")


# --- what the user chooses ------------------------------------------------------------------------


def test_labels_of_a_file_replace_those_that_do_not_fit(classifier, tmp_path) -> None:
    shutil.copytree(classifier, tmp_path / "m")
    config = json.loads((classifier / "config.json").read_text())
    config["id2label"] = {"0": "cat", "2": "dog"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert message_of(tmp_path / "m").endswith(
        "the classifier has 3 rows and id2label 2 labels: 1 id missing (1), 0 ids surplus; "
        "--labels FILE replaces them"
    )
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\n")
    named = Choices(labels=tmp_path / "names.txt")
    for source in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        assert load_checkpoint(str(source), named).config.labels == ("cat", "dog", "fox")


def test_labels_name_the_classes_of_a_file_without_a_configuration(seeded, tmp_path) -> None:
    head = {"head.weight": torch.ones(2, 64), "head.bias": torch.zeros(2)}
    save_file({**seeded.model.state_dict(), **head}, tmp_path / "w.safetensors")
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    got = load_checkpoint(str(tmp_path / "w.safetensors"), Choices(labels=tmp_path / "names.json"))
    assert got.config.labels == ("cat", "dog")


def test_weights_are_chosen_of_a_file_and_of_a_folder(encoder, tmp_path) -> None:
    state = weights_of(encoder)
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"model": state, "model_ema": other}, tmp_path / "pytorch_model.bin")
    shutil.copy(encoder / "config.json", tmp_path)
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        first = load_checkpoint(str(source))
        assert first.sha256 == load_checkpoint(str(encoder)).sha256
        assert first.notes == (
            "weights read from 'model'; the file also has 'model_ema' (--weights model_ema)",
        )
        second = load_checkpoint(str(source), Choices(weights="model_ema"))
        assert torch.equal(second.model.norm.bias, first.model.norm.bias + 1)


def test_seeded_weights_leave_nothing_to_choose(tiny) -> None:
    assert message_of("random:tiny", Choices(weights="model")) == (
        "checkpoint 'random:tiny' is drawn: it has no --weights and no --labels to choose"
    )


def test_what_transformers_ignores_is_a_note_and_what_is_missing_an_error(
    encoder, tmp_path
) -> None:
    state = weights_of(encoder)
    spare = {"pooler.dense.weight": torch.ones(4, 4), "embeddings.position_ids": torch.ones(1, 17)}
    save_file(state | spare, tmp_path / "model.safetensors")
    shutil.copy(encoder / "config.json", tmp_path)
    got = load_checkpoint(str(tmp_path))
    assert got.sha256 == load_checkpoint(str(encoder)).sha256
    assert got.notes == (
        "not read: 2 keys that transformers ignores with a warning (embeddings.position_ids, "
        "pooler.dense.weight)",
    )
    del state["layernorm.weight"]
    save_file(state | spare, tmp_path / "model.safetensors")
    assert "1 key missing (norm.weight)" in message_of(tmp_path)


# --- random ---------------------------------------------------------------------------------------


def test_random_weights_are_seeded_and_say_so(seeded) -> None:
    same, other = (load_checkpoint(f"random:tiny:{seed}") for seed in ("000", "1"))
    assert seeded.source == same.source == "random:tiny:0"
    assert other.source == "random:tiny:1"
    assert seeded.sha256 == same.sha256 != other.sha256
    assert seeded.notes == ("seeded random weights (seed 0), not a trained model",)


def test_no_random_weight_is_neutral(seeded) -> None:
    # a zero bias or a gain of 1 would hide that it was dropped
    for name, tensor in seeded.model.state_dict().items():
        assert 0.01 < tensor.std() < 0.03, name  # drawn with 0.02
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        assert abs(tensor.mean() - centre) < 0.01, name


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point huggingface_hub, which reads its environment once, at a cache of this test's own."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home"


@pytest.fixture
def hub(
    home: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    safe, pickled = tmp_path / "safe", tmp_path / "pickled"
    shutil.copytree(classifier, safe)
    shutil.copytree(classifier, pickled)
    torch.save(weights_of(classifier), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for folder in (safe, pickled):
        for name in ("training_args.bin", "tf_model.h5", "optimizer.pt", "modeling.py"):
            (folder / name).write_bytes(b"never asked for")
    (safe / "pytorch_model.bin").write_bytes(b"never asked for")
    with serve({"facebook/safe": safe, "facebook/pickled": pickled}) as (address, asked):
        point_at(address, monkeypatch)
        yield asked


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", address)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_hub_id_is_downloaded_once_and_only_what_is_read(hub, classifier) -> None:
    got = load_checkpoint("facebook/safe")
    assert got.source == f"facebook/safe@{COMMIT}"
    assert got.sha256 == load_checkpoint(str(classifier)).sha256
    assert got.processor == Processor("preprocessor_config.json", {"size": 32})
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(hub) == wanted
    hub.clear()
    load_checkpoint("facebook/safe")
    assert hub == []


def test_a_pickle_is_downloaded_only_where_there_is_nothing_better(hub, classifier) -> None:
    got = load_checkpoint("facebook/pickled@v1")
    assert got.source == f"facebook/pickled@{COMMIT}"
    assert got.sha256 == load_checkpoint(str(classifier)).sha256
    assert set(hub) == {"config.json", "preprocessor_config.json", "pytorch_model.bin"}


def test_weights_are_of_the_commit_that_the_configuration_is_of(
    hub, classifier, tmp_path, monkeypatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path / "snapshots" / "0a1b")

    shutil.copytree(tmp_path / "pickled", tmp_path / "snapshots" / "0a1b")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for source, revision in (("facebook/pickled@v1", "v1"), ("facebook/pickled", None)):
        assert load_checkpoint(source).source == "facebook/pickled@0a1b"
        assert asked == [("facebook/pickled", revision), ("facebook/pickled", "0a1b")]
        asked.clear()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("facebook/none", "Repository Not Found"), ("facebook/safe@v2", "Revision Not Found")],
)
def test_what_the_hub_does_not_have_is_named(hub, source, reason) -> None:
    message = message_of(source)
    assert message.startswith(f"hub checkpoint {source!r} cannot be had (")
    assert reason in message
    assert message.endswith("); check the name and the network, or give a local folder")


def test_without_a_network_what_is_in_the_cache_is_used(home, classifier, monkeypatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    message = message_of("facebook/vit-msn-tiny")
    assert "outgoing traffic has been disabled" in message
    assert message.endswith(" …); check the name and the network, or give a local folder")
    cached(home, "facebook/vit-msn-tiny", classifier)
    cached(home, "facebook/other", classifier, revision="v1")
    loaded: Checkpoint = load_checkpoint("facebook/vit-msn-tiny")
    assert loaded.source == f"facebook/vit-msn-tiny@{COMMIT}"
    assert loaded.sha256 == load_checkpoint("facebook/other@v1").sha256
    assert "facebook/other' cannot be had" in message_of("facebook/other")


def test_a_hub_that_does_not_answer_is_named(home, monkeypatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    message = message_of("facebook/vit-msn-small")
    assert "hub checkpoint 'facebook/vit-msn-small' cannot be had (" in message
    assert "Connection refused" in message
