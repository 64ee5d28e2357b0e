"""From a batch specification to a batch. Holds no state and no model: workers may read in any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.base.randomness import python_random
from library.batch import Conditioning, ItemAddress, TrainBatch
from library.config_util import DatasetPlan, SubsetPlan
from library.data import augment, images
from library.data.buckets import Bucketing, Placement, stated_crop
from library.data.captions import is_dropped, vary_caption
from library.data.order import BatchSpec, OrderedDataset
from library.data.records import ImageRecord


@dataclass(frozen=True)
class ImageSet:
    """The images of one dataset: records, where they are placed, how often they are seen."""

    plan: DatasetPlan
    records: tuple[ImageRecord, ...]
    placements: tuple[Placement, ...]
    repeats: tuple[int, ...]

    @classmethod
    def build(cls, plan: DatasetPlan, records: Sequence[ImageRecord], *, validation: bool = False) -> "ImageSet":
        """Place every record; for validation each is seen once and regularization images are left out."""
        if validation:
            kept = [record for record in records if not plan.subsets[record.subset].is_reg]
            repeats = [1] * len(kept)
        else:
            kept = list(records)
            repeats = balanced_repeats(plan.subsets, kept)
        bucketing = Bucketing.from_plan(plan)
        placements = tuple(bucketing.place(record.size) for record in kept)
        return cls(plan, tuple(kept), placements, tuple(repeats))

    def ordered(self) -> OrderedDataset:
        """What the order of an epoch depends on."""
        return OrderedDataset(
            keys=[record.key for record in self.records],
            subsets=[record.subset for record in self.records],
            repeats=self.repeats,
            buckets=[placement.bucket for placement in self.placements],
            batch_size=self.plan.batch_size,
        )

    def subset_of(self, item: ItemAddress) -> SubsetPlan:
        """The subset an item belongs to."""
        return self.plan.subsets[item.subset]

    @property
    def num_train_images(self) -> int:
        """Visits per epoch of images that are not for regularization."""
        return self._visits(is_reg=False)

    @property
    def num_reg_images(self) -> int:
        """Visits per epoch of regularization images."""
        return self._visits(is_reg=True)

    def _visits(self, *, is_reg: bool) -> int:
        return sum(
            n for record, n in zip(self.records, self.repeats) if self.plan.subsets[record.subset].is_reg is is_reg
        )


def balanced_repeats(subsets: Sequence[SubsetPlan], records: Sequence[ImageRecord]) -> list[int]:
    """Visits per epoch of each record.

    Training images are seen `num_repeats` times. Regularization images are seen in their order, first `num_repeats`
    times each, then once more per round, until together they are as many as the training images.
    """
    repeats = [0 if subsets[record.subset].is_reg else subsets[record.subset].num_repeats for record in records]
    regularization = [index for index, record in enumerate(records) if subsets[record.subset].is_reg]
    remaining = sum(repeats) if regularization else 0
    first = True
    while remaining > 0:
        for index in regularization:
            if remaining <= 0:
                break
            added = subsets[records[index].subset].num_repeats if first else 1
            repeats[index] += added
            remaining -= added
        first = False
    return repeats


def split_validation(plan: DatasetPlan, records: Sequence[ImageRecord], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the records to train on and to validate on; together they are all records.

    Each subset that is not for regularization gives the last share of its images, shuffled by the validation seed.
    """
    train: list[int] = []
    validate: list[int] = []
    for index, subset in enumerate(plan.subsets):
        members = [number for number, record in enumerate(records) if record.subset == index]
        if subset.is_reg or subset.validation_split <= 0:
            train += members
            continue
        own = subset.validation_seed if subset.validation_seed is not None else seed
        python_random(own, "split", index).shuffle(members)
        count = ceil(len(members) * (1 - subset.validation_split))
        train += members[:count]
        validate += members[count:]
    return sorted(train), sorted(validate)


class LatentReader(Protocol):
    """Where cached latents come from.

    Attributes:
        holds_masks: whether entries hold the loss mask whatever its origin, so that no mask has to be read from a file.
    """

    holds_masks: bool

    def read(self, item: ItemAddress, *, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """Latents [C, H, W] float32 of a visit, and its mask [h, w] in 0..1, mirrored as the latents are."""
        ...


class TextReader(Protocol):
    """Where cached text encoder outputs come from."""

    def read(self, item: ItemAddress, text: str) -> Conditioning:
        """Conditioning of one visit, with a batch axis of 1."""
        ...

    def collate(self, items: list[Conditioning]) -> Conditioning:
        """Join visits along the batch axis."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """What a batch has to contain.

    Attributes:
        seed: of the run.
        max_steps: length of the run, for caption warm-up.
        with_images: whether pixels are needed (False when every latent is cached).
        prior_loss_weight: loss weight of regularization images.
        masked_loss: whether control images are loss masks.
        exif_transpose: turn images as their EXIF data says.
        background: colour that transparent images are laid on; None keeps their hidden colours.
        caption_variants: captions per image that are cached; None when every visit makes its own.
        latents: where cached latents come from; None when there are none.
        texts: where cached text encoder outputs come from; None when they are not read with the batch.
    """

    seed: int
    max_steps: int
    with_images: bool
    prior_loss_weight: float = 1.0
    masked_loss: bool = False
    exif_transpose: bool = False
    background: tuple[int, int, int] | None = None
    caption_variants: int | None = None
    latents: LatentReader | None = None
    texts: TextReader | None = None


@dataclass
class View:
    """What one visit shows, cut to its bucket and mirrored where the visit is.

    Attributes:
        placement: bucket and crop of the visit.
        pixels: [h, w, 3] uint8.
        mask: [h, w] uint8, weight of the loss (255 is 1).
        control: [h, w, 3] uint8, the control image.
    """

    placement: Placement
    pixels: np.ndarray | None = None
    mask: np.ndarray | None = None
    control: np.ndarray | None = None


class TrainDataset(Dataset[TrainBatch]):
    """Reads whole batches; indexed by `BatchSpec`."""

    def __init__(self, sets: Sequence[ImageSet], settings: ReadSettings) -> None:
        self.sets = tuple(sets)
        self.settings = settings

    def __getitem__(self, spec: BatchSpec) -> TrainBatch:
        """The batch of a specification."""
        items = list(spec.items)
        captions = [self.caption(item, spec.step) for item in items]
        flipped = [self.is_flipped(item) for item in items]
        views = [
            self.view(item, flip, pixels=self.settings.with_images, control=not self._control_is_cached)
            for item, flip in zip(items, flipped)
        ]
        batch = self.describe(items, captions, flipped, spec.ordinal, views)
        reader = self.settings.latents
        if reader is not None:
            read = [reader.read(item, flipped=flip) for item, flip in zip(items, flipped)]
            batch.latents = torch.stack([latents for latents, _ in read])
            masks = [mask if view.mask is None else to_mask(view.mask) for view, (_, mask) in zip(views, read)]
            batch.masks = _stacked_masks(masks, batch.target_sizes)
        texts = self.settings.texts
        if texts is not None:
            batch.conditioning = texts.collate([texts.read(item, text) for item, text in zip(items, captions)])
        return batch

    @property
    def _control_is_cached(self) -> bool:
        latents = self.settings.latents
        return self.settings.masked_loss and latents is not None and latents.holds_masks

    def describe(
        self,
        items: list[ItemAddress],
        captions: list[str],
        flipped: list[bool],
        ordinal: int,
        views: Sequence[View],
    ) -> TrainBatch:
        """A batch of given visits: sizes, crops and weights follow from the plan."""
        places = [view.placement for view in views]
        records = [self.record(item) for item in items]
        subsets = [self.sets[item.dataset].subset_of(item) for item in items]
        crops = [
            _stated_corner(record.size, place.bucket, flip) for record, place, flip in zip(records, places, flipped)
        ]
        weights = [self.loss_weight(item) for item in items]
        targets = torch.tensor([place.bucket[::-1] for place in places])
        masks = [None if view.mask is None else to_mask(view.mask) for view in views]
        return TrainBatch(
            items=items,
            captions=captions,
            ordinal=ordinal,
            loss_weights=torch.tensor(weights),
            images=_stacked_pixels([view.pixels for view in views]),
            latents=None,
            original_sizes=torch.tensor([record.size[::-1] for record in records]),
            crop_top_lefts=torch.tensor(crops),
            target_sizes=targets,
            pixel_crops=torch.tensor([(*place.crop, *place.resized) for place in places]),
            flipped=flipped,
            subsets=[subset.name for subset in subsets],
            masks=_stacked_masks(masks, targets),
            control_images=_stacked_pixels([view.control for view in views]),
            attributes=[subset.custom_attributes for subset in subsets],
        )

    def record(self, item: ItemAddress) -> ImageRecord:
        """The image of a visit."""
        return self.sets[item.dataset].records[item.record]

    def subset(self, item: ItemAddress) -> SubsetPlan:
        """The subset of a visit."""
        return self.sets[item.dataset].subset_of(item)

    def loss_weight(self, item: ItemAddress) -> float:
        """Factor of the loss of a visit."""
        subset = self.subset(item)
        return subset.loss_weight * (self.settings.prior_loss_weight if subset.is_reg else 1.0)

    def placement(self, item: ItemAddress) -> Placement:
        """Bucket and crop of a visit."""
        placement = self.sets[item.dataset].placements[item.record]
        subset, record = self.subset(item), self.record(item)
        if not (subset.random_crop or subset.face_crop_aug_range):
            return placement
        rng = python_random(self.settings.seed, "crop", *item.parts())
        face = augment.face_in_name(record.path.stem) if subset.face_crop_aug_range else None
        if face is not None and subset.face_crop_aug_range:
            return augment.face_crop(
                record.size, placement.bucket, face, subset.face_crop_aug_range, rng, shift=subset.random_crop
            )
        return augment.random_crop(placement, rng) if subset.random_crop else placement

    def texts(self, item: ItemAddress) -> list[str]:
        """Every text that visits of this image may get when texts are cached, the empty one last where some drop it."""
        rules = self.subset(item).captions
        count = (self.settings.caption_variants or 1) if rules.varies else 1
        texts = [self._variant(item, number) for number in range(count)]
        return list(dict.fromkeys([*texts, ""] if rules.drops else texts))

    def _variant(self, item: ItemAddress, number: int) -> str:
        """A cached caption: a function of the image alone, so that caches serve runs of other seeds too."""
        rng = python_random(0, "caption variant", item.key, number)
        return vary_caption(self.record(item).caption, self.subset(item).captions, rng, step=0, max_steps=0)

    def caption(self, item: ItemAddress, step: int) -> str:
        """Text of a visit."""
        rules = self.subset(item).captions
        rng = python_random(self.settings.seed, "caption", *item.parts())
        # nothing is dropped in validation (epoch 0): it would measure another task
        if item.epoch > 0 and is_dropped(rules, rng, item.epoch):
            return ""
        if self.settings.caption_variants is not None:
            return self._variant(item, rng.randrange(self.settings.caption_variants) if rules.varies else 0)
        return vary_caption(self.record(item).caption, rules, rng, step=step, max_steps=self.settings.max_steps)

    def is_flipped(self, item: ItemAddress) -> bool:
        """Whether this visit shows the mirrored image."""
        flips = self.subset(item).flip_aug and item.epoch > 0
        return flips and python_random(self.settings.seed, "flip", *item.parts()).random() < 0.5

    def view(
        self,
        item: ItemAddress,
        flipped: bool,
        *,
        pixels: bool = True,
        control: bool = True,
        placement: Placement | None = None,
    ) -> View:
        """What a visit shows.

        Args:
            item: the visit.
            flipped: whether it is mirrored.
            pixels: read the image and its alpha channel.
            control: read the control image or mask.
            placement: bucket and crop instead of those of the visit.

        Raises:
            UserError: an image that cannot be decoded.
        """
        placement = placement or self.placement(item)
        subset, record = self.subset(item), self.record(item)
        view = View(placement)
        if pixels:
            decoded = self._decode(record.path, alpha=subset.alpha_mask)
            part = images.cut(decoded, placement, subset.resize_interpolation)
            colours = part[..., :3]
            if subset.color_aug:
                colours = augment.colour(colours, python_random(self.settings.seed, "colour", *item.parts()))
            view.pixels = colours
            view.mask = part[..., 3] if subset.alpha_mask else None
        if control and record.control is not None:
            # cut like its image: a control image that is squeezed instead no longer lies over it
            part = images.cut(self._decode(record.control), placement, subset.resize_interpolation)
            if self.settings.masked_loss:
                view.mask = part[..., 0]
            else:
                view.control = part
        return _mirrored(view) if flipped else view

    def _decode(self, path: Path, *, alpha: bool = False) -> np.ndarray:
        settings = self.settings
        return images.decode(path, alpha=alpha, exif_transpose=settings.exif_transpose, background=settings.background)


def to_mask(mask: np.ndarray) -> Tensor:
    """[h, w] uint8 -> float32 in 0..1."""
    return torch.from_numpy(mask.astype(np.float32) / 255.0)


def _mirrored(view: View) -> View:
    def turned(part: np.ndarray | None) -> np.ndarray | None:
        return None if part is None else part[:, ::-1]

    return View(view.placement, turned(view.pixels), turned(view.mask), turned(view.control))


def _stacked_pixels(parts: Sequence[np.ndarray | None]) -> Tensor | None:
    """[B, 3, h, w] in [-1, 1], or None when there are none."""
    present = [images.to_unit_range(part) for part in parts if part is not None]
    return torch.from_numpy(np.stack(present)) if present and len(present) == len(parts) else None


def _stacked_masks(masks: Sequence[Tensor | None], sizes: Tensor) -> Tensor | None:
    """[B, h, w]; images without a mask count everywhere; None when no image has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(*size) if mask is None else mask for mask, size in zip(masks, sizes.tolist())])


def _stated_corner(size: tuple[int, int], bucket: tuple[int, int], flipped: bool) -> tuple[int, int]:
    """(top, left) of the size conditioning; a mirrored image counts its left from the other side."""
    left, top, right, _ = stated_crop(size, bucket)
    return int(top), int(bucket[0] - right) if flipped else int(left)
