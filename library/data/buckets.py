"""Which size an image is trained at, and how it gets there.

Sizes here are (width, height) in pixels. The rules are those of the reference's buckets, so that folders cached or
planned with it give the same sizes.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from library.config_util import DatasetPlan


@dataclass(frozen=True)
class Placement:
    """Resize an image to `resized`, then cut `bucket` out of its centre at `crop` (x, y)."""

    bucket: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]

    @property
    def crop_loss(self) -> float:
        """Share of the resized image that is cut away."""
        return 1 - self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])


@dataclass(frozen=True)
class Bucketing:
    """Assigns image sizes to buckets.

    Attributes:
        resolution: width and height whose product is the target area.
        minimum: shortest allowed side, a multiple of `steps`.
        maximum: longest allowed side, a multiple of `steps`.
        steps: sides are multiples of this.
        no_upscale: images smaller than the target area keep their size.
        enabled: False: every image is brought to `resolution`.
    """

    resolution: tuple[int, int]
    minimum: int
    maximum: int
    steps: int
    no_upscale: bool
    enabled: bool = True

    @classmethod
    def from_plan(cls, plan: DatasetPlan) -> "Bucketing":
        """The bucketing of a dataset; limits are rounded outwards to multiples of the step."""
        steps = plan.bucket_reso_steps
        return cls(
            resolution=plan.resolution,
            minimum=plan.min_bucket_reso // steps * steps,
            maximum=-(-plan.max_bucket_reso // steps) * steps,
            steps=steps,
            no_upscale=plan.bucket_no_upscale,
            enabled=plan.enable_bucket,
        )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Predefined buckets, ascending: about the target area, sides between minimum and maximum."""
        area = self.resolution[0] * self.resolution[1]
        side = int(math.sqrt(area) // self.steps) * self.steps
        found = {(side, side)}
        for width in range(max(self.minimum, self.steps), self.maximum + 1, self.steps):
            height = min(self.maximum, area // width // self.steps * self.steps)
            if height >= max(self.minimum, self.steps):
                found |= {(width, height), (height, width)}
        return sorted(found)

    def refusal(self, size: tuple[int, int]) -> str | None:
        """Why an image of `size` has no bucket: without enlarging, a side shorter than one step leaves nothing."""
        if not (self.enabled and self.no_upscale) or min(self._shrunk(size)) >= self.steps:
            return None
        return (
            f"is {size[0]}x{size[1]} pixels: with bucket_no_upscale a side shorter than bucket_reso_steps "
            f"({self.steps}) leaves no bucket; remove the image, allow enlarging, or use smaller steps"
        )

    def place(self, size: tuple[int, int]) -> Placement:
        """Bucket, resized size and crop of an image of `size` that is not refused."""
        if not self.enabled:
            return _covering(size, self.resolution)
        return self._shrinking(size) if self.no_upscale else _covering(size, self._closest(size))

    def _closest(self, size: tuple[int, int]) -> tuple[int, int]:
        """The listed bucket of this very size, else the one whose aspect ratio is nearest (first on ties)."""
        index = bisect_left(self.sizes, size)
        if index < len(self.sizes) and self.sizes[index] == size:
            return size
        ratio = size[0] / size[1]
        return min(self.sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))

    def _shrinking(self, size: tuple[int, int]) -> Placement:
        """Bring a larger image down to the target area, then cut to whole steps; never enlarge."""
        resized = self._shrunk(size)
        bucket = resized[0] // self.steps * self.steps, resized[1] // self.steps * self.steps
        return Placement(bucket, resized, _centre(resized, bucket))

    def _shrunk(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size itself, or about the target area, along the side that keeps the aspect ratio better."""
        width, height = size
        area = self.resolution[0] * self.resolution[1]
        if width * height <= area:
            return size
        ratio = width / height
        wide = math.sqrt(area * ratio)
        by_width, by_height = self._floor(wide), self._floor(area / wide)
        error_w = abs(by_width / self._floor(by_width / ratio) - ratio)
        error_h = abs(self._floor(by_height * ratio) / by_height - ratio)
        if error_w < error_h:
            return by_width, int(by_width / ratio + 0.5)
        return int(by_height * ratio + 0.5), by_height

    def _floor(self, value: float) -> int:
        rounded = int(value + 0.5)
        return max(rounded - rounded % self.steps, self.steps)


def _covering(size: tuple[int, int], bucket: tuple[int, int]) -> Placement:
    """Scale so that the bucket is covered, cut the excess in the middle."""
    wider = size[0] / size[1] > bucket[0] / bucket[1]
    scale = bucket[1] / size[1] if wider else bucket[0] / size[0]
    resized = max(int(size[0] * scale + 0.5), bucket[0]), max(int(size[1] * scale + 0.5), bucket[1])
    return Placement(bucket, resized, _centre(resized, bucket))


def _centre(resized: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def stated_crop(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """Crop (left, top, right, bottom) as caches and size conditioning state it.

    It describes the image fitted *into* the bucket, not what was cut; existing adapters and caches were made with it.
    """
    ratio, bucket_ratio = size[0] / size[1], bucket[0] / bucket[1]
    if bucket_ratio > ratio:
        width, height = bucket[1] * ratio, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / ratio
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height
