"""Decode, resize and cut images."""

import importlib
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from library.base.errors import UserError
from library.data.buckets import Placement

_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_ALWAYS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OPTIONAL = {".avif": "pillow>=11.3", ".jxl": "pillow-jxl-plugin"}
_MAX_PIXELS = 500_000_000
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {  # orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ACROSS = (5, 6, 7, 8)  # of these, those that make width height
_TAIL = 64 * 1024  # bytes at a file's end in which its end mark is looked for
_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128), "gray": (128, 128, 128)}
_TURNED_ALREADY = ("JXL", "TIFF")  # formats that Pillow turns while it decodes, whatever their EXIF data goes on saying
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_REMEDY = "repair or remove it, or pass --skip_bad_images to leave it out"
_DAMAGED_EXIF = (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error)


@cache
def optional_formats() -> dict[str, str]:
    """Suffix -> package to install, of the formats that could be read but are not here."""
    readable = {".avif": _reads_avif(), ".jxl": _reads_jxl()}
    return {suffix: package for suffix, package in _OPTIONAL.items() if not readable[suffix]}


@cache
def extensions() -> tuple[str, ...]:
    """Suffixes, in lower case, of the images that this installation reads."""
    return (*_ALWAYS, *(suffix for suffix in _OPTIONAL if suffix not in optional_formats()))


def _reads_avif() -> bool:
    return features.check("avif") or _registers("pillow_avif")


def _reads_jxl() -> bool:
    return _registers("pillow_jxl")


def _registers(plugin: str) -> bool:
    """Whether a plugin of Pillow can be imported; it registers itself when it is."""
    try:
        importlib.import_module(plugin)
    except ImportError:
        return False
    return True


@cache
def _prepare() -> None:
    """Make Pillow read every format and large images: once in each process, when its first image is opened."""
    extensions()
    # Pillow warns above 89 megapixels, which scans and stitched photographs reach, and refuses twice that. It has no
    # limit per call, so its own is raised; another one that is higher, or None, was set on purpose and stays
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, _MAX_PIXELS)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """An image file whose header has been read, up to the size limit."""
    _prepare()
    with Image.open(path) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise Image.DecompressionBombError
        yield image


def _reason(path: Path, error: BaseException) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"is larger than {_MAX_PIXELS // 1_000_000} megapixels: make it smaller"
    if path.is_dir():
        return "is a folder"
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "is empty (zero bytes)"
        return "is not an image, whatever its name says"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, RuntimeError):  # from inside a decoder, whose words (advice to build it anew) mislead
        return "cannot be read: its data is damaged"
    return f"cannot be read: {error}"


def _orientation(image: Image.Image) -> int:
    """What EXIF data says of the image's orientation, from the header alone; all but the keys of `_TURNS` are upright.

    Damaged EXIF data says nothing: the pixels are sound, and no reason to refuse the image.
    """
    if image.format in _TURNED_ALREADY and not getattr(image, "jpeg", False):  # a JPEG inside JXL is left as it was
        return 1
    try:
        # not the method of PNG files: that one decodes the whole image to look for EXIF data behind the pixels
        value = Image.Image.getexif(image).get(_ORIENTATION)
    except _DAMAGED_EXIF:
        return 1
    return value if isinstance(value, int) else 1


def read_size(path: Path, *, exif_transpose: bool = False) -> tuple[int, int]:
    """(width, height) in pixels from the header; with `exif_transpose` those of the turned image.

    Raises:
        ValueError: what is wrong with the file, without its name.
    """
    try:
        with _open(path) as image:
            return image.size[::-1] if exif_transpose and _orientation(image) in _ACROSS else image.size
    except _UNREADABLE as error:
        raise ValueError(_reason(path, error)) from error


def has_rotation(path: Path) -> bool:
    """Whether EXIF data says that the image has to be turned or mirrored; False for a file that cannot be read."""
    try:
        with _open(path) as image:
            return _orientation(image) in _TURNS
    except _UNREADABLE:
        return False


def looks_truncated(path: Path) -> bool:
    """Whether the file's end is missing; a suspicion from its last bytes is confirmed by decoding it.

    Formats without a cheap mark of their end, and files that are no images, are not suspected.

    Raises:
        OSError: the file cannot be opened.
    """
    if _has_end(path):
        return False
    try:
        decode(path)
    except UserError:
        return True
    return False


def _has_end(path: Path) -> bool:
    """Whether the mark or size of the format's end is where it should be; True where a format has none."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"\xff\xd8"):
        # at the very end, but for padding: the tail of a small file may hold that of the thumbnail in its header
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head[:2] == b"BM":
        return int.from_bytes(head[2:6], "little") <= size
    return True


def parse_background(text: str | None) -> tuple[int, int, int] | None:
    """A colour from its name or #rrggbb; None for None and "keep".

    Raises:
        ValueError: neither.
    """
    if text is None or text == "keep":
        return None
    if text in _COLOURS:
        return _COLOURS[text]
    if re.fullmatch("#[0-9a-fA-F]{6}", text):
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    raise ValueError(f"expected keep, {', '.join(_COLOURS)} or #rrggbb")


def decode(
    path: Path,
    *,
    alpha: bool = False,
    exif_transpose: bool = False,
    background: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """An image file as [h, w, 3] uint8 in RGB, or with `alpha` [h, w, 4].

    Args:
        path: the file; of several frames the first counts.
        alpha: return the alpha channel too, 255 where there is none.
        exif_transpose: turn the image as its EXIF data says.
        background: colour under transparent pixels; None keeps the colours that are hidden there.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with _open(path) as image:
            # from the header, as `read_size` does: after loading there may be more EXIF data than before
            turn = _TURNS.get(_orientation(image)) if exif_transpose else None
            image.load()
            converted = _eight_bit(image)
            if turn is not None:
                converted = converted.transpose(turn)
            transparent = converted.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in converted.info
            pixels = np.asarray(converted.convert("RGBA" if transparent else "RGB"))
    except _UNREADABLE as error:
        reason = _reason(path, error).replace("cannot be read", "cannot be decoded")
        raise UserError(str(path), message=f"{reason}; {_REMEDY}") from error
    if pixels.shape[2] == 4 and background is not None:
        pixels = np.concatenate((_composed(pixels, background), pixels[..., 3:]), axis=2)
    if alpha and pixels.shape[2] == 3:
        return np.concatenate((pixels, np.full_like(pixels[..., :1], 255)), axis=2)
    return pixels if alpha or pixels.shape[2] == 3 else np.ascontiguousarray(pixels[..., :3])


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits scaled to 8: converting it directly would cut everything above 255 to white.

    Whole numbers range to 65535; numbers with a fraction to 1, or to 255 where one is above 1.
    """
    if image.mode.startswith("I"):
        # 65535 -> 255; adding half of the odd divisor rounds to the nearest
        values = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        values = (values * (255 if values.max(initial=0) <= 1 else 1) + 0.5).clip(0, 255)
    else:
        return image
    return Image.fromarray(values.astype(np.uint8))


def _composed(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """[h, w, 4] laid on a colour: [h, w, 3]."""
    share = pixels[..., 3:].astype(np.float32) / 255
    mixed = pixels[..., :3] * share + np.array(background, np.float32) * (1 - share)
    return (mixed + 0.5).astype(np.uint8)


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str | None) -> np.ndarray:
    """Resize [h, w], [h, w, 3] or [h, w, 4] uint8 to (width, height).

    Without a name of an interpolation: area where no side grows, else lanczos. Colour and alpha are resized apart, so
    that the colours do not depend on whether alpha is there.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        colours = resize(np.ascontiguousarray(pixels[..., :3]), size, interpolation)
        mask = resize(np.ascontiguousarray(pixels[..., 3]), size, interpolation)
        return np.concatenate((colours, mask[..., None]), axis=2)
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
    """The part of an image that is trained on: [h, w, ...] uint8 of the bucket's size."""
    resized = resize(pixels, placement.resized, interpolation)
    (x, y), (width, height) = placement.crop, placement.bucket
    return resized[y : y + height, x : x + width]


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] uint8 -> [3, h, w] float32 in [-1, 1]."""
    return np.ascontiguousarray((pixels.astype(np.float32) / 255.0 - 0.5).transpose(2, 0, 1) * 2.0)
