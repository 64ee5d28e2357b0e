"""Facts of a run that follow from options and data, worked out once and written nowhere else."""

import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from library.base.dtypes import dtype_from_name
from library.checkpoint.saver import Names
from library.data.build import ImageSets
from library.data.dataset import LatentReader, ReadSettings, TextReader, TrainDataset
from library.data.images import parse_background
from library.modules.components import Variant
from library.modules.quantize import prepare_fp8
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.data import DataOptions
from library.options.loss import LossOptions
from library.options.model import ModelOptions
from library.options.precision import PrecisionOptions
from library.options.schedule import LengthOptions
from library.options.schema import OptionSet
from library.strategy_base import Strategies


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

    def dataset(
        self, *, validation: bool = False, latents: LatentReader | None = None, texts: TextReader | None = None
    ) -> TrainDataset:
        """The readable dataset of training or validation.

        Args:
            validation: which of the two.
            latents: where cached latents come from.
            texts: where cached text encoder outputs come from.
        """
        settings = read_settings(
            self.options, seed=self.seed, max_steps=self.max_steps, with_images=not self.cache_latents
        )
        images = self.images.validation if validation else self.images.train
        return TrainDataset(images, replace(settings, latents=latents, texts=texts))


def read_settings(options: OptionSet, *, seed: int, max_steps: int, with_images: bool) -> ReadSettings:
    """How images and captions are read."""
    data = options[DataOptions]
    return ReadSettings(
        seed=seed,
        max_steps=max_steps,
        with_images=with_images,
        prior_loss_weight=data.prior_loss_weight,
        masked_loss=options[LossOptions].masked_loss,
        exif_transpose=data.exif_transpose,
        background=parse_background(data.alpha_background),
        caption_variants=_caption_variants(options),
    )


def _caption_variants(options: OptionSet) -> int | None:
    text = options.get(TextCachingOptions)
    return (text.cache_caption_variants or 1) if text is not None and text.active else None


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


def data_workers(options: OptionSet, images: ImageSets) -> int:
    """Data-loader processes; none when there is nothing to decode, since the rest is quicker than a process."""
    in_memory = wants_latent_cache(options) and not options[CachingOptions].cache_latents_to_disk
    control = any(record.control is not None for dataset in images.train for record in dataset.records)
    if wants_latent_cache(options) and (in_memory or not control):
        return 0
    return min(options[DataOptions].max_data_loader_n_workers, os.cpu_count() or 1)


def weight_dtypes(options: OptionSet) -> tuple[torch.dtype, torch.dtype]:
    """(frozen weights, VAE)."""
    dtype = dtype_from_name(options[PrecisionOptions].mixed_precision)
    assert dtype is not None
    return dtype, torch.float32 if options[ModelOptions].no_half_vae else dtype


def autocast_context(device: torch.device, dtype: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    """Makes the context that models compute in."""
    return contextlib.nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)


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


def narrow_denoiser(options: OptionSet) -> bool:
    """Whether the denoiser's blocks keep their weights in 8 bits; some families have a flag of their own for it."""
    precision = options[PrecisionOptions]
    return bool(precision.fp8_base or precision.fp8_base_unet or options.values().get("fp8_scaled"))


def narrow_text_encoders(options: OptionSet) -> bool:
    """The same of text encoders."""
    precision = options[PrecisionOptions]
    return bool((precision.fp8_base and not precision.fp8_base_unet) or options.values().get("fp8_vl"))


def preparations(options: OptionSet, strategies: Strategies) -> dict[str, Callable[[nn.Module], None]]:
    """How the parts keep their weights, as arguments of `Need`."""
    denoising, text = strategies.denoising, strategies.text_encoding
    prepared: dict[str, Callable[[nn.Module], None]] = {}
    if narrow_denoiser(options):
        prepared["prepare_denoiser"] = lambda module: prepare_fp8(denoising.blocks(module))
    if narrow_text_encoders(options):
        # transformers gives T5's `wo` inputs of the format of its weight
        prepared["prepare_text_encoder"] = lambda module: prepare_fp8(text.blocks(module), skip=("wo",))
    return prepared
