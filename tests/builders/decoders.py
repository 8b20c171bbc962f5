"""What a decoding process runs in tests; light, for every such process imports it."""

import os
import time
from pathlib import Path

import numpy as np

from msn_export.images import Fitted


def slow_when_early(path: Path):
    """Take the longer the earlier a picture comes: a race that would break the order."""
    number = int(path.name)
    time.sleep(0.05 if number % 3 == 0 else 0)
    return Fitted(np.full((1, 1, 1), number, np.uint8), turned=False)


def deadly(path: Path):
    """End the process, as a decoder does that a hostile file reaches."""
    if "deadly" in path.name:
        os._exit(11)
    return Fitted(np.zeros((1, 1, 1), np.uint8), turned=False)


def marking(path: Path, folder: Path):
    """Leave a mark that says this picture was decoded."""
    (folder / path.name).touch()
    return Fitted(np.zeros((1, 1, 1), np.uint8), turned=False)
