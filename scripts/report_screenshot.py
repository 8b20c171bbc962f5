"""Take the picture of a report that the README shows: the page as a headless Chromium paints it.

    python scripts/report_screenshot.py demo/report.html docs/images/report.png

It must load without a word on the console. Needs chromium and chromedriver, and Pillow.
"""

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.fakes.browser import chromium, look_at

WIDTH, HEIGHT = 1180, 2270  # pixels: down to the images that agree least
COLOURS = 128  # a palette: a quarter of the size, and nothing to be seen of it


def main(page: Path, output: Path) -> None:
    """Open the page, refuse one that complains, and write its upper part as PNG."""
    if not page.is_file():
        raise SystemExit(f"{page} does not exist; make report writes it")
    with chromium(WIDTH, HEIGHT) as browser:
        look_at(browser, page)
        said = browser.get_log("browser")
        if said:
            raise SystemExit(f"{page} complains: {said}")
        shot = browser.get_screenshot_as_png()
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(COLOURS).save(output, optimize=True)
    print(f"{output}: {picture.width}x{picture.height}, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
