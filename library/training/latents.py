"""Where the latents of a batch come from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.base.randomness import address
from library.batch import ItemAddress, TrainBatch
from library.options.caching import CachingOptions
from library.strategy_base import LatentsCachingStrategy, Strategies


class LatentEncoder:
    """Images to latents with one VAE.

    Args:
        strategy: of the family.
        vae: frozen.
        channels: of the latents.
        factor: pixels per latent pixel.
        sample_seed: draw posterior samples addressed by this seed; None takes the mode.
        chunk: images per call of the VAE.
    """

    def __init__(
        self,
        strategy: LatentsCachingStrategy,
        vae: nn.Module,
        *,
        channels: int,
        factor: int,
        sample_seed: int | None = None,
        chunk: int = 1,
    ) -> None:
        self.strategy = strategy
        self.vae = vae
        self.channels = channels
        self.factor = factor
        self.sample_seed = sample_seed
        self.chunk = chunk

    @classmethod
    def for_run(cls, strategies: Strategies, vae: nn.Module, caching: CachingOptions, seed: int) -> "LatentEncoder":
        """The encoder that a run's options ask for."""
        return cls(
            strategies.latents_caching,
            vae,
            channels=strategies.denoising.latent_channels,
            factor=strategies.denoising.spatial_factor,
            sample_seed=seed if caching.vae_sample else None,
            chunk=caching.vae_batch_size,
        )

    @torch.no_grad()
    def encode(self, images: Tensor, items: Sequence[ItemAddress]) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> [B, C, H, W] float32 on the VAE's device.

        Raises:
            UserError: the VAE gave values that are no numbers.
        """
        parts = []
        for start in range(0, len(items), self.chunk):
            parts.append(self._encode(images[start : start + self.chunk], items[start : start + self.chunk]))
        latents = torch.cat(parts)
        if not bool(torch.isfinite(latents).all()):
            keys = [item.key for item, latent in zip(items, latents) if not bool(torch.isfinite(latent).all())]
            raise UserError(", ".join(keys), message="the VAE gave NaN for this image; try --no_half_vae")
        return latents

    def _encode(self, images: Tensor, items: Sequence[ItemAddress]) -> Tensor:
        if self.sample_seed is None:
            return self.strategy.encode(self.vae, images)
        shape = self.channels, images.shape[2] // self.factor, images.shape[3] // self.factor
        noise = torch.stack([_unit_noise(self.sample_seed, item, shape) for item in items])
        return self.strategy.encode_sample(self.vae, images, noise)


def _unit_noise(seed: int, item: ItemAddress, shape: Sequence[int]) -> Tensor:
    """Posterior noise belongs to the image, not to the visit, so a cache is a function of the image."""
    generator = torch.Generator().manual_seed(address(seed, "vae", item.dataset, item.subset, item.key))
    return torch.randn(tuple(shape), generator=generator)


class LatentSource:
    """Latents of batches: those that were read with the batch, else encoded now.

    Args:
        encoder: used for what is not cached; None when everything is.
    """

    def __init__(self, encoder: LatentEncoder | None) -> None:
        self.encoder = encoder

    def get(self, batch: TrainBatch) -> Tensor:
        """[B, C, H, W] float32, as the family's cache holds them."""
        if batch.latents is not None:
            return batch.latents
        assert self.encoder is not None and batch.images is not None
        return self.encoder.encode(batch.images, batch.items)
