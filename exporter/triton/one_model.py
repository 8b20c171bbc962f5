"""Which artifacts can be served as one model."""

from collections.abc import Sequence

from msn_export.errors import SpecError
from msn_export.spec import Targets
from msn_export.triton.artifact import Artifact, Platform
from msn_export.triton.check_tensors import RTX


def require_one_model(artifacts: Sequence[Artifact]) -> None:
    """Require one graph, or engines of full TensorRT that are one model for different GPUs.

    Raises:
        SpecError: they are not; the message says what can be served instead.
    """
    for artifact in artifacts:
        if artifact.platform is Platform.PLAN:
            _require_servable(artifact)
    if len(artifacts) == 1:
        return
    if any(artifact.platform is Platform.ONNX for artifact in artifacts):
        raise SpecError(
            "several artifacts are one model's engines for several GPUs, and an .onnx runs on all; "
            "give it alone, and a second model in a call of its own with another --name"
        )
    seen: dict[Targets, Artifact] = {}
    for artifact in artifacts:
        if len(artifact.targets.named) != 1:
            raise SpecError(f"{artifact.path} does not say which GPU it is for; build it again")
        other = seen.setdefault(artifact.targets, artifact)
        if other is not artifact:
            raise SpecError(
                f"{other.path} and {artifact.path} are both for {artifact.targets}; give one"
            )
        _require_same_facts(artifact, artifacts[0])


def _require_servable(artifact: Artifact) -> None:
    flavour, version = artifact.built_with or ("?", "?")
    if flavour != "tensorrt":
        raise SpecError(f"{artifact.path} is {RTX.format(version=version)}")
    if artifact.manifest is None:
        raise SpecError(
            f"{artifact.path} has no manifest, and an engine does not tell its tensors and "
            "profiles without a GPU; build it with msn-export trt"
        )


def _require_same_facts(artifact: Artifact, first: Artifact) -> None:
    for fact in ("inputs", "outputs", "profiles", "built_with", "labels"):
        if getattr(artifact, fact) != getattr(first, fact):
            raise SpecError(
                f"{artifact.path} and {first.path} differ in their {fact.replace('_', ' ')}; "
                "one model's engines are built from one graph by one TensorRT"
            )
