"""What msn_export.runtime and msn_export.engine need of Python 3.11; it is ``sitecustomize`` of a Python 3.10.

Only the interpreter of the bundle tensorrt-8.6 runs so (docs/gpu.md): the package itself asks for 3.11. That there
is no more was found with vermin, which lists the least version of each name (those two packages and what they import).
"""

import enum
import hashlib
import typing

if not hasattr(typing, "Self"):
    typing.Self = typing.TypeVar("Self")
if not hasattr(enum, "StrEnum"):

    class StrEnum(str, enum.Enum):  # noqa: UP042  that is what is missing
        """Text among a few."""

        __str__ = str.__str__

        @staticmethod
        def _generate_next_value_(name: str, *_: object) -> str:
            return name.lower()

    enum.StrEnum = StrEnum
if not hasattr(hashlib, "file_digest"):

    def file_digest(file: typing.BinaryIO, name: str) -> typing.Any:
        """Hash a file from where it stands, a part at a time."""
        digest = hashlib.new(name)
        for block in iter(lambda: file.read(1 << 18), b""):
            digest.update(block)
        return digest

    hashlib.file_digest = file_digest
