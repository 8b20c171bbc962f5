"""What a runner gives: its outputs by name."""

from collections.abc import Iterator, Mapping
from typing import Any


class Outputs(Mapping[str, Any]):
    """The outputs of one call, as ``outputs["embedding"]`` and as ``outputs.embedding``.

    Each holds one row an image, in the order of the images, and is of the kind that was given:
    NumPy arrays for NumPy arrays, and tensors of the same library on the same device for others.
    An output that is called like a method (``keys``, ``get``) is reached by name only.
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Any:
        try:
            return self._arrays[name]
        except KeyError:
            raise KeyError(self._lacks(name)) from None

    def __getattr__(self, name: str) -> Any:
        if name == "_arrays":  # asked for before __init__: by copy, by pickle
            raise AttributeError(name)
        try:
            return self._arrays[name]
        except KeyError:
            raise AttributeError(self._lacks(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._arrays]

    def __repr__(self) -> str:
        shapes = (f"{name} {list(array.shape)}" for name, array in self._arrays.items())
        return f"Outputs({', '.join(shapes)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Outputs, (self._arrays,)

    def _lacks(self, name: str) -> str:
        return f"there is no output {name!r}; there is {', '.join(self._arrays)}"
