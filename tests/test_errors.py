"""One class catches all that this package raises on purpose; narrower ones are of their kind."""

from msn_export import errors
from msn_export.errors import DeviceError, FusionError, GraphError, MsnExportError, RunnerError

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type)]


def test_every_error_is_one_of_ours() -> None:
    assert len(CLASSES) > 10
    assert all(issubclass(kind, MsnExportError) for kind in CLASSES)


def test_who_catches_the_wider_one_catches_the_narrower() -> None:
    assert issubclass(FusionError, GraphError)
    assert issubclass(DeviceError, RunnerError)
    parents = {kind.__name__: kind.__mro__[1] for kind in CLASSES}
    assert {name for name, parent in parents.items() if parent is not MsnExportError} == {
        "MsnExportError", "FusionError", "DeviceError",
    }  # fmt: skip
