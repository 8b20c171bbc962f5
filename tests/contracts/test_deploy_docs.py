"""docs/deploy.md says what is so: its files parse, and name what the commands write."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

from msn_export.cli import main
from msn_export.cluster.replica import Serving
from msn_export.triton_server.model import RELEASES, for_tensorrt, parse_release
from tests.contracts.triton_faults import FAULTS

DOCUMENT = Path(__file__).parent.parent.parent / "docs/deploy.md"

pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="the documentation is not here")


@pytest.fixture(scope="module")
def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def resources(text) -> dict[str, dict]:
    found = [one for block in blocks(text, "yaml") for one in yaml.safe_load_all(block)]
    return {one["kind"]: one for one in found}


def table() -> str:
    rows = "".join(f"| {fault.name} | {fault.by} |\n" for fault in FAULTS)
    return f"| wrong | refused by |\n|---|---|\n{rows}"


def test_the_table_of_faults_is_the_one_that_is_tested(text) -> None:
    shown = text.split("<!-- faults -->\n")[1].split("<!-- /faults -->")[0]
    assert shown == table()


def test_every_image_is_a_known_release(text) -> None:
    tags = set(re.findall(r"tritonserver:([0-9.]+)-py3", text))
    assert tags
    assert tags <= {release.name for release in RELEASES}


def test_the_tensorrt_to_install_is_the_releases(text) -> None:
    version = re.search(r"'tensorrt==([0-9.]+)'\s+# Triton (\S+) and (\S+)", text)
    assert version is not None
    assert for_tensorrt(version[1]).name == version[3]
    assert parse_release(version[2]).tensorrt == version[1]


def test_the_deployment_and_its_service_fit_each_other(resources) -> None:
    template = resources["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["Service"]["spec"]["selector"] == labels
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for port in resources["Service"]["spec"]["ports"]:
        assert ports[port["targetPort"]] == port["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in template["spec"]["volumes"]} == set(mounts)
    assert f"--model-repository={mounts['models']}" in container["args"]


def test_kserve_serves_the_repository_with_the_readmes_tag(resources) -> None:
    model = resources["InferenceService"]["spec"]["predictor"]["model"]
    assert model["modelFormat"]["name"] == "triton"
    assert model["protocolVersion"] == "v2"
    assert model["storageUri"].endswith("/models")
    assert parse_release(model["runtimeVersion"].removesuffix("-py3")) in RELEASES
    assert "--disable-auto-complete-config" in model["args"]


def test_deepstream_hands_over_the_tensor_that_a_uint8_graph_takes(text) -> None:
    preprocess, infer = (configparser.ConfigParser() for _ in range(2))
    first, second = blocks(text, "ini")
    preprocess.read_string(first)
    infer.read_string(second)
    given = preprocess["property"]
    assert given["tensor-name"] == "images"
    assert given["network-input-order"] == "1"  # NHWC
    assert given["tensor-data-type"] == "1"  # UINT8
    batch, height, width, channels = map(int, given["network-input-shape"].split(";"))
    assert (height, width) == (given.getint("processing-height"), given.getint("processing-width"))
    assert channels == 3
    assert infer["property"].getint("batch-size") == batch
    assert given["target-unique-ids"] == infer["property"]["gie-unique-id"]
    assert preprocess["user-configs"].getfloat("pixel-normalization-factor") == 1


def test_every_command_has_the_options_it_is_shown_with(text) -> None:
    shown = re.findall(r"^(?:\$ )?msn-export (\w+) (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(shown) >= 8
    for name, rest in shown:
        known = {option for param in main.commands[name].params for option in param.opts}
        given = set(re.findall(r"(?<!\S)(--?[a-z][a-z0-9-]*)", rest))
        assert given <= known, f"msn-export {name} has no {given - known}"


@pytest.mark.parametrize(("command", "part"), [("triton", 0), ("embed", 1)])
def test_the_option_table_names_options_that_there_are(text, command, part) -> None:
    tables = text.split("\n## Ray\n")[part]
    options = set(re.findall(r"^\| `(--[a-z-]+)[` ]", tables, re.MULTILINE))
    known = {option for param in main.commands[command].params for option in param.opts}
    assert options
    assert options <= known


def test_the_services_arguments_are_all_named_with_their_defaults(text) -> None:
    table = text.split("| argument | |\n")[1].split("\n\n")[0]
    shown = dict(re.findall(r"`([a-z]+)=([A-Za-z0-9,]+)`", table))
    assert set(shown) == set(Serving.__dataclass_fields__)
    numbers = {name: int(value) for name, value in shown.items() if value.isdigit()}
    assert numbers == {"replicas": 1, "cpus": 1, "gpus": 0, "wait": 5, "decoders": 1}
    plain = Serving(Path("m.onnx"))
    for name, value in numbers.items():
        assert (plain.share.get("num_gpus", 0) if name == "gpus" else getattr(plain, name)) == value
