"""Copy the photographs that ship inside scikit-image into a folder.

    python scripts/photographs.py FOLDER

Needs scikit-image; the folder is made. Nothing is downloaded.
"""

import argparse
import shutil
import sys
from pathlib import Path

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


def main(folder: Path) -> None:
    """Copy them, and say how many."""
    try:
        import skimage
    except ModuleNotFoundError:
        sys.exit(
            "scikit-image, which has the photographs, is not installed; pip install scikit-image"
        )
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        shutil.copy(data / name, folder / name)
    print(f"{len(PHOTOGRAPHS)} photographs of scikit-image {skimage.__version__} in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy sixteen photographs into a folder.")
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
