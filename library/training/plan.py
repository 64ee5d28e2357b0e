"""Facts of a run that follow from options and data, worked out once and written nowhere else."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.base.dtypes import dtype_from_name
from library.checkpoint.saver import Names
from library.data.build import ImageSets
from library.data.dataset import ReadSettings, TrainDataset
from library.modules.components import Variant
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.data import DataOptions
from library.options.model import ModelOptions
from library.options.precision import PrecisionOptions
from library.options.schedule import LengthOptions
from library.options.schema import OptionSet


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What will be done.

    Attributes:
        options: all options.
        variant: the model, read from its header.
        images: what is trained and validated on.
        names: of result files.
        seed: of everything random.
        dtype: of frozen weights and, under autocast, of computation.
        vae_dtype: of the VAE.
        accumulation: micro-steps per process and optimizer step.
        world_size: processes.
        num_batches: batches per epoch over all processes.
        steps_per_epoch: optimizer steps per epoch.
        max_steps: optimizer steps of the run.
        num_epochs: epochs begun.
        workers: data-loader processes.
        cache_latents: whether latents are encoded before training.
        cache_text: whether text encoder outputs are.
    """

    options: OptionSet
    variant: Variant
    images: ImageSets
    names: Names
    seed: int
    dtype: torch.dtype
    vae_dtype: torch.dtype
    accumulation: int
    world_size: int
    num_batches: int
    steps_per_epoch: int
    max_steps: int
    num_epochs: int
    workers: int
    cache_latents: bool
    cache_text: bool

    def dataset(self, *, validation: bool = False) -> TrainDataset:
        """The readable dataset of training or validation."""
        settings = ReadSettings(
            seed=self.seed,
            max_steps=self.max_steps,
            with_images=not self.cache_latents,
            prior_loss_weight=self.options[DataOptions].prior_loss_weight,
        )
        return TrainDataset(self.images.validation if validation else self.images.train, settings)


def training_length(length: LengthOptions, num_batches: int, window: int) -> tuple[int, int, int]:
    """(optimizer steps per epoch, optimizer steps, epochs) of a run.

    Args:
        length: the options; epochs win over steps.
        num_batches: batches per epoch over all processes.
        window: batches per optimizer step over all processes.
    """
    per_epoch = -(-num_batches // window)
    steps = length.max_train_epochs * per_epoch if length.max_train_epochs else length.max_train_steps
    return per_epoch, steps, -(-steps // per_epoch)


def data_workers(options: OptionSet, *, reads_images: bool) -> int:
    """Data-loader processes; none when there is nothing to decode, since the rest is quicker than a process."""
    wanted = options[DataOptions].max_data_loader_n_workers
    return min(wanted, os.cpu_count() or 1) if reads_images else 0


def weight_dtypes(options: OptionSet) -> tuple[torch.dtype, torch.dtype]:
    """(frozen weights, VAE)."""
    dtype = dtype_from_name(options[PrecisionOptions].mixed_precision)
    assert dtype is not None
    return dtype, torch.float32 if options[ModelOptions].no_half_vae else dtype


def wants_latent_cache(options: OptionSet) -> bool:
    """Whether latents are cached."""
    caching = options[CachingOptions]
    return caching.cache_latents or caching.cache_latents_to_disk


def wants_text_cache(options: OptionSet) -> bool:
    """Whether text encoder outputs are cached."""
    text = options.get(TextCachingOptions)
    return text is not None and text.active


def bucket_rows(images: ImageSets) -> Sequence[tuple[int, tuple[int, int], int, float]]:
    """(dataset, bucket, visits per epoch, mean crop loss) of every bucket that is trained on."""
    rows = []
    for number, dataset in enumerate(images.train):
        for bucket, count in dataset.ordered().bucket_counts().items():
            losses = [place.crop_loss for place in dataset.placements if place.bucket == bucket]
            rows.append((number, bucket, count, sum(losses) / len(losses)))
    return rows
