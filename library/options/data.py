"""Options about images: where they are, how they are sized and changed."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option

_COLOUR = re.compile("white|black|grey|gray|keep|#[0-9a-fA-F]{6}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data: images, captions files and batches."""

    dataset_config: Path | None = option(None, help="TOML file that describes the datasets")
    train_data_dir: str | None = option(None, help="folder of training images")
    reg_data_dir: str | None = option(None, help="folder of regularization images")
    in_json: str | None = option(None, help="JSON or JSON Lines file that lists images with captions")
    conditioning_data_dir: str | None = option(None, help="folder of control images or loss masks, named as the images")
    dataset_repeats: int = option(1, help="repeats of every image of a subset that does not say its own")
    dataset_class: str | None = option(None, help="your own dataset class, as package.module.ClassName")
    train_batch_size: int = option(1, help="images per batch")
    max_data_loader_n_workers: int = option(8, help="processes that prepare batches; 0: none, less memory")
    persistent_data_loader_workers: bool = option(False, help="keep those processes between epochs")
    cache_info: bool = option(False, help="keep captions and image sizes in a file in the image folder")
    debug_dataset: bool = option(False, help="show what the dataset yields instead of training")
    prior_loss_weight: float = option(1.0, help="weight of the loss of regularization images")
    skip_bad_images: bool = option(
        False, help="decode every image first, and leave out those that cannot be read instead of stopping"
    )
    exif_transpose: bool = option(False, help="turn images as the orientation in their EXIF data says")
    alpha_background: str | None = option(
        None, help="colour under transparent pixels: white, black, grey or #rrggbb; their hidden colours when not given"
    )
    allow_missing_captions: bool = option(False, help="go on when many images have no caption file")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, train_batch_size=self.train_batch_size, dataset_repeats=self.dataset_repeats)
        yield from at_least(
            0, max_data_loader_n_workers=self.max_data_loader_n_workers, prior_loss_weight=self.prior_loss_weight
        )
        if self.alpha_background is not None and not _COLOUR.fullmatch(self.alpha_background):
            yield Problem("--alpha_background", "expected white, black, grey or #rrggbb", self.alpha_background)


@dataclass(frozen=True, kw_only=True)
class BucketOptions:
    """Size and buckets: the resolutions that images are trained at."""

    resolution: str | None = option(None, help='training resolution in pixels: "size" or "width,height"')
    enable_bucket: bool = option(False, help="group images of different shapes into buckets")
    min_bucket_reso: int = option(256, help="shortest side of a bucket")
    max_bucket_reso: int = option(1024, help="longest side of a bucket")
    bucket_reso_steps: int = option(64, help="bucket sides are multiples of this")
    bucket_no_upscale: bool = option(False, help="make buckets from image sizes without enlarging any image")
    resize_interpolation: str | None = option(
        None,
        help="resampling when images are resized; when not given, area to shrink and lanczos to enlarge",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, bucket_reso_steps=self.bucket_reso_steps, min_bucket_reso=self.min_bucket_reso)
        if self.min_bucket_reso > self.max_bucket_reso:
            yield Problem(
                "--min_bucket_reso", f"is above --max_bucket_reso ({self.max_bucket_reso})", self.min_bucket_reso
            )
        if self.resolution is not None and not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)?", self.resolution):
            yield Problem("--resolution", 'expected "size" or "width,height" in pixels', self.resolution)


@dataclass(frozen=True, kw_only=True)
class AugmentOptions:
    """Augmentation: random changes of images."""

    color_aug: bool = option(False, help="vary hue and gamma a little")
    flip_aug: bool = option(False, help="mirror images at random")
    face_crop_aug_range: str | None = option(
        None, help='crop around the face marked in the file name: "low,high" times the face size'
    )
    random_crop: bool = option(False, help="crop at a random place instead of the centre")
    alpha_mask: bool = option(False, help="use the alpha channel of images as a mask for the loss")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.face_crop_aug_range is None:
            return
        try:
            low, high = (float(text) for text in self.face_crop_aug_range.split(","))
        except ValueError:
            low, high = 1.0, 0.0
        if low > high:
            message = 'expected "low,high", two numbers with low not above high'
            yield Problem("--face_crop_aug_range", message, self.face_crop_aug_range)


@dataclass(frozen=True, kw_only=True)
class DatasetDict:
    """Datasets given from Python, in the shape of the dataset TOML; not a flag."""

    content: Mapping[str, Any]
