"""Decode, resize and cut images."""

from pathlib import Path

import numpy as np
from PIL import Image

from library.base.errors import UserError
from library.data.buckets import Placement

_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


def decode(path: Path) -> np.ndarray:
    """An image file as RGB [h, w, 3] uint8.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(str(path), message=f"cannot be decoded: {error}") from error


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize to (width, height); without a name: area where no side grows, else lanczos."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    name = interpolation or ("area" if width >= size[0] and height >= size[1] else "lanczos")
    if name in _PILLOW:
        return np.asarray(Image.fromarray(pixels).resize(size, _PILLOW[name]))
    import cv2

    codes = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
        "lanczos4": cv2.INTER_LANCZOS4,
    }
    return cv2.resize(pixels, size, interpolation=codes[name])


def cut(pixels: np.ndarray, placement: Placement, interpolation: str | None) -> np.ndarray:
    """The part of an image that is trained on: [h, w, 3] uint8 of the bucket's size."""
    resized = resize(pixels, placement.resized, interpolation)
    (x, y), (width, height) = placement.crop, placement.bucket
    return resized[y : y + height, x : x + width]


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 -> [3, h, w] float32 in [-1, 1]."""
    return np.ascontiguousarray((pixels.astype(np.float32) / 255.0 - 0.5).transpose(2, 0, 1) * 2.0)
