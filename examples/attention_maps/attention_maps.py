"""Draw the attention of [CLS] in the last block over pictures, as one page that loads nothing."""

import argparse
import base64
import io
import sys
from pathlib import Path

import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray
from PIL import Image

from msn_export.errors import MsnExportError, SpecError
from msn_export.image_folder import find
from msn_export.images import decode
from msn_export.runtime import open_runner

PAGE = """<!doctype html><meta charset="utf-8"><title>Attention of {{ model }}</title>
<style>:root { color-scheme: light dark } body { font: 15px system-ui, sans-serif; margin: 2rem }
figure { display: inline-block; margin: 0 .5rem 1rem 0 } img { width: 9rem; display: block }</style>
<h1>Attention of [CLS] in the last block of {{ model }}</h1>
{% for name, shown in pictures %}<section><h2>{{ name }}</h2>
{% for title, uri in shown %}<figure><img src="{{ uri }}" alt="{{ title }}">{{ title }}</figure>
{% endfor %}</section>
{% endfor %}"""


def overlay(pixels: NDArray[np.uint8], weights: NDArray[np.floating]) -> Image.Image:
    """Darken a picture [h, w, 3] where a map of attention [rows, columns] is below its peak."""
    picture = Image.fromarray(pixels)
    share = Image.fromarray((255 * weights / weights.max()).astype(np.uint8))
    mask = share.resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture, picture.point(lambda value: value // 5), mask)


def data_uri(picture: Image.Image) -> str:
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def draw(model: Path, folder: Path, page: Path) -> None:
    """Write the page for the first eight pictures of a folder."""
    paths = find(folder).paths[:8]
    with open_runner(model) as runner:
        if "attention" not in [output.name for output in runner.outputs]:
            raise SpecError(f"{model} has no output 'attention'; export it with --head attention")
        assert runner.manifest is not None, "attention is a head of msn-export"
        assert runner.manifest.preprocessing is not None, "a graph's manifest says how it is fed"
        pixels = decode(paths, runner.manifest.preprocessing)  # as the model sees them
        attention = runner(runner.preprocess(paths)).attention  # [b, heads, rows, columns]
    pictures = []
    for path, image, maps in zip(paths, pixels, attention, strict=True):
        titles = ["mean of the heads", *(f"head {head}" for head in range(len(maps)))]
        shown = [("picture", data_uri(Image.fromarray(image)))]
        shown += [
            (f"{title}, peak {weights.max():.1%}", data_uri(overlay(image, weights)))
            for title, weights in zip(titles, [maps.mean(axis=0), *maps], strict=True)
        ]
        pictures.append((path.name, shown))
    template = Environment(autoescape=True).from_string(PAGE)
    page.write_text(template.render(model=model.name, pictures=pictures), encoding="utf-8")
    print(f"{page}: {len(pictures)} pictures, {len(maps)} heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "pictures", "page"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        draw(given.model, given.pictures, given.page)
    except MsnExportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
