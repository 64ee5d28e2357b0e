"""What travels from the data to the model in one micro-step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemAddress:
    """One visit of one image: where it is, and what its random draws are addressed by.

    Attributes:
        dataset: index of the dataset in the plan.
        subset: index of the subset in the dataset.
        record: index of the image record in the dataset.
        key: path below the subset's folder, with forward slashes.
        repeat: which of the repeats of this epoch.
        epoch: from 1.
    """

    dataset: int
    subset: int
    record: int
    key: str
    repeat: int
    epoch: int

    def parts(self) -> tuple[int | str, ...]:
        """What a draw for this visit is addressed by, besides seed and purpose."""
        return (self.epoch, self.dataset, self.subset, self.key, self.repeat)


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of a batch; each family adds its fields, all batched on the first axis or None."""

    def to(self, device: torch.device) -> Self:
        """The same with every tensor on `device`."""
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)

    def merged(self, other: Self) -> Self:
        """Fields of `other` where they are set, else ours (freshly encoded over cached)."""
        chosen = {f.name: getattr(other, f.name) for f in fields(self) if getattr(other, f.name) is not None}
        return replace(self, **chosen)

    def item(self, index: int) -> Self:
        """The conditioning of one sample, batch axis kept."""
        cut = {f.name: None if (v := getattr(self, f.name)) is None else v[index : index + 1] for f in fields(self)}
        return replace(self, **cut)

    @classmethod
    def collate(cls, items: list[Self]) -> Self:
        """Join samples along the batch axis; families with ragged fields override this."""
        joined = {}
        for f in fields(cls):
            values = [getattr(item, f.name) for item in items]
            joined[f.name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)


@dataclass
class TrainBatch:
    """One batch of images of equal size. None means "not available in this run", never "empty".

    Shapes: B batch; h, w pixels; C, H, W latents.
    """

    items: list[ItemAddress]
    captions: list[str]
    ordinal: int  # position of the batch in the epoch, counted over all ranks
    loss_weights: Tensor  # [B] float32
    images: Tensor | None  # [B, 3, h, w] in [-1, 1]
    latents: Tensor | None  # [B, C, H, W], as the family's cache holds them
    original_sizes: Tensor  # [B, 2] (h, w) of the files
    crop_top_lefts: Tensor  # [B, 2] (top, left) as size conditioning states them
    target_sizes: Tensor  # [B, 2] (h, w) of the bucket
    pixel_crops: Tensor  # [B, 4] (x, y, resized w, resized h): what was really cut
    flipped: list[bool]
    subsets: list[str]  # folder name of each item's subset
    masks: Tensor | None = None  # [B, h, w] in 0..1: weight of the loss
    control_images: Tensor | None = None  # [B, 3, h, w] in [-1, 1]
    attributes: Sequence[Mapping[str, Any]] = ()  # custom_attributes of each item's subset
    conditioning: Conditioning | None = None  # text encoder outputs read from caches

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.items)

    @property
    def image_keys(self) -> list[str]:
        """Path of each image below its subset's folder."""
        return [item.key for item in self.items]


@dataclass(frozen=True)
class StepInputs:
    """Everything random or data-dependent of one micro-step: recorded and replayed as it is.

    Attributes:
        batch: the images' captions and sizes.
        latents: scaled, as noise is added to them [B, C, H, W] float32.
        noise: [B, C, H, W] float32.
        noisy: what the model sees [B, C, H, W] float32.
        timesteps: noise level in 0..1000 units [B] float32.
        sigmas: noise level in [0, 1] [B] float32; flow families only.
        target: what the prediction is compared with [B, C, H, W] float32.
        weight: loss weight of the noise level [B], or None.
        module_seed: seed of the draws inside modules.
        extra: further channels that the model sees beside the noisy latents [B, E, H, W] float32, or None.
        draws: what a family draws per image besides noise, by name, each [B, ...] float32.
    """

    batch: TrainBatch
    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    sigmas: Tensor | None
    target: Tensor
    weight: Tensor | None
    module_seed: int
    extra: Tensor | None = None
    draws: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "StepInputs":
        """The same with every tensor the model needs on `device`."""
        names = ("latents", "noise", "noisy", "timesteps", "sigmas", "target", "weight", "extra")
        moved: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in names}
        draws = {name: tensor.to(device) for name, tensor in self.draws.items()}
        return replace(self, **moved, draws=draws)
