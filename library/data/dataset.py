"""From a batch specification to a batch. Holds no state and no model: workers may read in any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch.utils.data import Dataset

from library.base.randomness import python_random
from library.batch import ItemAddress, TrainBatch
from library.config_util import DatasetPlan, SubsetPlan
from library.data import images
from library.data.buckets import Bucketing, Placement, stated_crop
from library.data.captions import process_caption
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
        if subset.is_reg or plan.validation_split <= 0:
            train += members
            continue
        python_random(plan.validation_seed if plan.validation_seed is not None else seed, "split", index).shuffle(
            members
        )
        count = ceil(len(members) * (1 - plan.validation_split))
        train += members[:count]
        validate += members[count:]
    return sorted(train), sorted(validate)


@dataclass(frozen=True)
class ReadSettings:
    """What a batch has to contain.

    Attributes:
        seed: of the run.
        max_steps: length of the run, for caption warm-up.
        with_images: whether pixels are needed (False when every latent is cached).
        prior_loss_weight: loss weight of regularization images.
    """

    seed: int
    max_steps: int
    with_images: bool
    prior_loss_weight: float


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
        pixels = None
        if self.settings.with_images:
            pixels = torch.from_numpy(np.stack([self.pixels(item, flip) for item, flip in zip(items, flipped)]))
        return self.describe(items, captions, flipped, spec.ordinal, pixels)

    def describe(
        self,
        items: list[ItemAddress],
        captions: list[str],
        flipped: list[bool],
        ordinal: int,
        pixels: torch.Tensor | None,
    ) -> TrainBatch:
        """A batch of given visits: sizes, crops and weights follow from the plan."""
        places = [self.placement(item) for item in items]
        records = [self.record(item) for item in items]
        subsets = [self.sets[item.dataset].subset_of(item) for item in items]
        crops = [
            _stated_corner(record.size, place.bucket, flip) for record, place, flip in zip(records, places, flipped)
        ]
        weights = [self.settings.prior_loss_weight if subset.is_reg else 1.0 for subset in subsets]
        return TrainBatch(
            items=items,
            captions=captions,
            ordinal=ordinal,
            loss_weights=torch.tensor(weights),
            images=pixels,
            latents=None,
            original_sizes=torch.tensor([record.size[::-1] for record in records]),
            crop_top_lefts=torch.tensor(crops),
            target_sizes=torch.tensor([place.bucket[::-1] for place in places]),
            pixel_crops=torch.tensor([(*place.crop, *place.resized) for place in places]),
            flipped=flipped,
            subsets=[subset.name for subset in subsets],
        )

    def record(self, item: ItemAddress) -> ImageRecord:
        """The image of a visit."""
        return self.sets[item.dataset].records[item.record]

    def placement(self, item: ItemAddress) -> Placement:
        """Bucket and crop of a visit."""
        return self.sets[item.dataset].placements[item.record]

    def caption(self, item: ItemAddress, step: int) -> str:
        """Text of a visit."""
        rng = python_random(self.settings.seed, "caption", *item.parts())
        return process_caption(
            self.record(item).caption,
            self.sets[item.dataset].subset_of(item).captions,
            rng,
            epoch=item.epoch,
            step=step,
            max_steps=self.settings.max_steps,
        )

    def is_flipped(self, item: ItemAddress) -> bool:
        """Whether this visit shows the mirrored image."""
        flips = self.sets[item.dataset].subset_of(item).flip_aug and item.epoch > 0
        return flips and python_random(self.settings.seed, "flip", *item.parts()).random() < 0.5

    def pixels(self, item: ItemAddress, flipped: bool) -> np.ndarray:
        """Pixels of a visit: [3, h, w] float32 in [-1, 1]."""
        subset = self.sets[item.dataset].subset_of(item)
        part = images.cut(images.decode(self.record(item).path), self.placement(item), subset.resize_interpolation)
        return images.to_unit_range(part[:, ::-1] if flipped else part)


def _stated_corner(size: tuple[int, int], bucket: tuple[int, int], flipped: bool) -> tuple[int, int]:
    """(top, left) of the size conditioning; a mirrored image counts its left from the other side."""
    left, top, right, _ = stated_crop(size, bucket)
    return int(top), int(bucket[0] - right) if flipped else int(left)
