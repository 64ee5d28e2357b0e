"""Noise processes: how a noise level mixes data and noise, and what the model is asked for."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from library.diffusion.noise import LevelDraw


class NoiseProcess(Protocol):
    """One way from data to noise.

    Noise levels travel as `timesteps` [B] float32 in 0..1000 units and, in flow families, `sigmas` [B] in [0, 1].
    """

    def sample(
        self, draws: Sequence[LevelDraw], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the noise level of each item from its own source: (timesteps, sigmas or None).

        Args:
            draws: one per item.
            latent_size: (height, width) of the latents.
            offsets: shift of each item's distribution towards noise, in logits; processes without logits ignore it.
        """
        ...

    def at(self, timesteps: Tensor) -> Tensor | None:
        """Sigmas of given timesteps (None where the process has none)."""
        ...

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """Noisy latents, float32."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, float32."""
        ...

    def weight(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor | None:
        """Loss weight of each sample [B], or None for 1."""
        ...

    def noise_to_signal(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """Amplitude of the noise over that of the data [B]; infinite where nothing of the data is left."""
        ...


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] with the rank of `like`."""
    return values.view(-1, *([1] * (like.ndim - 1)))


def fixed_timesteps(low: int, high: int, count: int) -> list[int]:
    """Inner points of an even grid over [low, high]: 0..1000 and 4 gives 200, 400, 600, 800."""
    return [int(value) for value in torch.linspace(low, high, count + 2, dtype=torch.float64)[1:-1]]
