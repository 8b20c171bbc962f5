"""Pictures and plots as text that a page holds inside itself."""

from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING

from PIL import Image

from msn_export.report.facts import Picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIDE = 144  # pixels: shown at half of that, sharp on dense screens, some 6 kB each


def thumbnail(name: str, pixels: NDArray[np.uint8]) -> Picture:
    """Make a small JPEG of decoded pixels [h, w, c] as a data URI."""
    channels = pixels.shape[-1]
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :3])
    picture.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=80)
    return Picture(name, f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}")


def inline(svg: str, prefix: str, title: str) -> str:
    """Make a stand-alone SVG part of a page: named for those who do not see it, ids its own.

    Two figures on one page must not share ids, and an XML prologue has no place in HTML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    # a font of the page, not of the machine that drew it
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)
    return body.replace("<svg ", f'<svg role="img" aria-label="{_quoted(title)}" ', 1)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
