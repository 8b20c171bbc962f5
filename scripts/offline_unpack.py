"""Check the pieces of a bundle and unpack them: python3 unpack.py FOLDER (or --check alone).

Standard library only, Python 3.8 and later: it runs where nothing is installed. A piece that is
missing, cut short or altered is named, and then nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from pathlib import Path
from typing import IO, Any


def verify(here: Path) -> tuple[dict[str, Any], list[Path]]:
    """Give the paths of all pieces, each with the size and SHA-256 that bundle.json states."""
    about = json.loads((here / "bundle.json").read_text())
    paths = []
    for piece in about["pieces"]:
        name = str(piece["name"])
        path = here / name
        if Path(name).name != name:
            raise SystemExit(f"bundle.json names {name!r}, which lies elsewhere; refused")
        if not path.is_file():
            raise SystemExit(f"piece {name} is missing; copy it here")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if path.stat().st_size != piece["bytes"] or digest.hexdigest() != piece["sha256"]:
            raise SystemExit(f"piece {name} is damaged (its SHA-256 differs); copy it again")
        paths.append(path)
    return about, paths


class Joined:
    """The pieces read one after another as one stream."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = list(paths)
        self.file: IO[bytes] | None = None

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes."""
        while True:
            if self.file is None:
                if not self.paths:
                    return b""
                self.file = self.paths.pop(0).open("rb")
            block = self.file.read(size)
            if block:
                return block
            self.file.close()
            self.file = None


def main(arguments: list[str]) -> None:
    """Verify, then unpack."""
    if len(arguments) != 1:
        raise SystemExit("usage: python3 unpack.py FOLDER, or python3 unpack.py --check")
    about, paths = verify(Path(__file__).resolve().parent)
    print(f"{about['recipe']}: {len(paths)} pieces verified")
    if arguments == ["--check"]:
        return
    target = Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=Joined(paths), mode="r|xz") as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(target, filter="data")
        else:  # before 3.8.17: the pieces were verified above
            archive.extractall(target)  # noqa: S202
    target = target.resolve()  # the suite is run from a folder of its own
    python = target / "python" / "bin" / f"python{about['python']}"
    if python.exists():
        print(f"run it with: PYTHONPATH={target}/site {python}")
        run = f"{python} {target}/run/tensorrt_8_6.py run FOLDER"
        print(f"its engine: PYTHONPATH={target}/site {run}")
    else:
        print(f"use it with: export PYTHONPATH={target}/site")
    if (target / "suite").exists():
        tests = "scripts/card.sh RESULTS"
        print(f"its tests: cd {target}/suite && PYTHONPATH={target}/site {tests}")


if __name__ == "__main__":
    main(sys.argv[1:])
