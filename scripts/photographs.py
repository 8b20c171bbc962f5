"""Copy the photographs that ship inside scikit-image into a folder."""

import shutil
import sys
from pathlib import Path

import skimage

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip


def main(folder: Path) -> None:
    """Copy them, and say how many."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        shutil.copy(data / name, folder / name)
    print(f"{len(PHOTOGRAPHS)} photographs of scikit-image {skimage.__version__} in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
