"""Random changes of images; every draw comes from the generator of one visit."""

from random import Random

import numpy as np

from library.data.buckets import Placement

_COLOUR_SHARE = 0.33  # of the visits
_HUE = 8.0  # largest shift, in half degrees
_GAMMA = 0.05  # largest distance of the exponent from 1


def random_crop(placement: Placement, rng: Random) -> Placement:
    """The same size from a random place."""
    excess = [full - kept for full, kept in zip(placement.resized, placement.bucket)]
    return Placement(placement.bucket, placement.resized, (rng.randint(0, excess[0]), rng.randint(0, excess[1])))


def colour(pixels: np.ndarray, rng: Random) -> np.ndarray:
    """[h, w, 3] uint8 with, in a third of the visits, a little other hue or gamma."""
    if rng.random() > _COLOUR_SHARE:
        return pixels
    if rng.random() < 0.5:
        return _with_hue(pixels, rng.uniform(-_HUE, _HUE))
    values = (pixels / 255.0) ** rng.uniform(1 - _GAMMA, 1 + _GAMMA)
    return (values * 255.0 + 0.5).astype(np.uint8)


def _with_hue(pixels: np.ndarray, shift: float) -> np.ndarray:
    import cv2

    values = cv2.cvtColor(np.ascontiguousarray(pixels).astype(np.float32) / 255.0, cv2.COLOR_RGB2HSV)
    values[..., 0] = (values[..., 0] + 2.0 * shift) % 360.0  # degrees in the format of floats
    return (cv2.cvtColor(values, cv2.COLOR_HSV2RGB) * 255.0 + 0.5).clip(0, 255).astype(np.uint8)


def face_in_name(stem: str) -> tuple[int, int, int, int] | None:
    """Centre x, centre y, width and height of the face in a name like `photo_512_300_120_140`; None without them."""
    parts = stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    x, y, width, height = map(int, parts[-4:])
    return (x, y, width, height) if width and height else None


def face_crop(
    size: tuple[int, int],
    bucket: tuple[int, int],
    face: tuple[int, int, int, int],
    face_range: tuple[float, float],
    rng: Random,
    *,
    shift: bool,
) -> Placement:
    """A crop around the face whose shorter side is between low and high times the face, where the image allows it.

    The image is enlarged only as far as is needed to cover the bucket, so a small face may stay smaller than asked.

    Args:
        size: of the image (width, height).
        bucket: size of the crop.
        face: centre x, centre y, width, height, in pixels of the image.
        face_range: low and high.
        rng: of the visit.
        shift: move the crop, likelier a little than far, so that it may lose the face; otherwise the face stays in
            the middle but for a twentieth of its size.
    """
    side, largest = min(bucket), max(face[2:])
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    low_scale = max(cover, min(1.0, side / (largest * face_range[1])))
    high_scale = max(low_scale, min(1.0, side / (largest * face_range[0])))
    scale = low_scale if low_scale == high_scale else rng.uniform(low_scale, high_scale)
    resized = tuple(max(int(length * scale + 0.5), kept) for length, kept in zip(size, bucket))
    length = largest * scale
    jitter = face_range[0] != face_range[1] and length > side / 10 and length >= 40
    x, y = (
        _start(resized[axis], bucket[axis], face[axis] * scale, length if jitter else 0.0, rng, shift=shift)
        for axis in (0, 1)
    )
    return Placement(bucket, (resized[0], resized[1]), (x, y))


def _start(full: int, kept: int, centre: float, face: float, rng: Random, *, shift: bool) -> int:
    """Where the crop begins on one axis."""
    start = int(centre) - kept // 2
    if shift:  # two draws: near the face is likelier than far away, and every place can be reached
        reach = max(full - start, start)
        start += rng.randint(0, reach) + rng.randint(0, reach) - reach
    elif face:
        start += rng.randint(-int(face // 20), int(face // 20))
    return min(max(start, 0), full - kept)
