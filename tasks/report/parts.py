"""A small JPEG of a picture as a data URL, so that the page needs no other file."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from multimodal.data.images.decode import BadImage, decode_image

__all__ = ["Thumbnail", "policy", "thumbnail"]


SIDE = 224  # pixels of the longer side; a smaller picture keeps its size


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A data URL with its size in pixels; or no URL, and in `reason` why there is none."""

    url: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""


def thumbnail(image: Image.Image | bytes | None) -> Thumbnail:
    """A JPEG of at most 224 x 224 pixels, about 10 KB, on white where the picture is transparent.

    A picture that cannot be read costs its place on the page, not the page: the reason stands where it would have been.
    """
    if image is None:
        return Thumbnail(reason="no picture was kept")
    try:
        small = _small(decode_image(image) if isinstance(image, bytes) else image)
    except BadImage as error:
        return Thumbnail(reason=f"the picture cannot be shown: {error.reason}")
    except (OSError, ValueError) as error:  # a Pillow image that was never loaded, and whose file is closed or damaged
        return Thumbnail(reason=f"the picture cannot be shown: {error}")
    stream = BytesIO()
    small.save(stream, "JPEG", quality=82, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return Thumbnail(url=url, width=small.width, height=small.height)


def _small(image: Image.Image) -> Image.Image:
    """RGB, at most SIDE on the longer side; the caller's picture stays as it is."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    small = image.convert("RGB")  # a copy, also where it is RGB already
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


# ----------------------------------------
# What a page may load: nothing but pictures inside it, and the very style and script that it was written with.


def policy(style: str, script: str = "") -> str:
    """The content security policy of a page with this inline style and script; without a script none may run."""
    scripts = _digest(script) if script else "'none'"
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {_digest(style)}; script-src {scripts}"


def _digest(text: str) -> str:
    """The source expression that lets the browser use this inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
