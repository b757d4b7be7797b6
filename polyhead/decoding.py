"""From the bytes of a picture to upright 8-bit RGB, whatever kind of file it is."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image

from polyhead.errors import BadSample, reason

# Formats that Pillow decodes itself, without those that start a program (EPS) or match almost anything (TGA)
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "ICO")
MAX_PIXELS = 178_956_970


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, target: int | None = None) -> Image.Image:
    """The picture in `data` as 8-bit RGB, upright.

    - transparent pixels show a white ground; of an animation or a stack the first frame is taken;
    - the orientation in EXIF is applied; colour profiles are not;
    - 16-bit grey keeps its high byte; 32-bit whole numbers are taken as 16-bit ones (clipped); fractions as
      0..1 if none is above 1, else as 0..255 (clipped).

    Args:
        max_pixels: refuse more; Pillow's own limit of 178,956,970 holds besides.
        target: the shorter side that is needed. A JPEG at least four times as large is decoded at 1/2, 1/4 or
            1/8, never below twice the target.

    Raises:
        BadSample: not a picture, damaged, cut short, empty or too large, with a reason of one line.
    """
    if not data:
        raise BadSample("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                _check_size(image.size, max_pixels)
                if target is not None and image.format in ("JPEG", "MPO"):
                    image.draft(None, (2 * target, 2 * target))
                image.load()
                return to_rgb(image)
    except BadSample:
        raise
    except Image.UnidentifiedImageError:
        raise BadSample("not an image in a format that is read here") from None
    except Image.DecompressionBombError as error:
        raise BadSample(f"too many pixels: {reason(error)}") from None
    except MemoryError:
        raise BadSample("not enough memory to decode it") from None
    except Exception as error:
        # Decoders raise almost anything on damaged input
        raise BadSample(f"the image is damaged: {reason(error)}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadSample(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise BadSample(f"too many pixels: {width} x {height} is more than {max_pixels:,}")


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded Pillow image of any mode as upright 8-bit RGB (see `decode_image`)."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        orientation = None
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        image = Image.fromarray(_eight_bits(np.asarray(image), mode))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):
            image = image.convert(image.mode.upper())
        rgba = image.convert("RGBA")
        ground = Image.new("RGB", rgba.size, (255, 255, 255))
        ground.paste(rgba, mask=rgba.getchannel("A"))
        image = ground
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image


def _eight_bits(pixels: np.ndarray, mode: str) -> np.ndarray:
    if mode == "F":
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=255.0, neginf=0.0)
        if pixels.max() <= 1:
            pixels = pixels * 255
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return (np.clip(pixels.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
