"""The denoising diffusion process of Stable Diffusion (Ho et al., 2020) with its scaled-linear schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from library.diffusion.noise import LevelDraw
from library.diffusion.process import per_sample

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
_MOST_SNR = 1000.0  # beyond it a signal-to-noise ratio counts as this in the loss weights


@lru_cache
def alphas_cumprod(*, zero_terminal: bool = False) -> Tensor:
    """Products of 1 - beta over the schedule beta_t = linspace(sqrt(start), sqrt(end))^2: [1000] float32.

    Args:
        zero_terminal: shift and stretch their square roots so that the last one is 0 and the first stays
            (Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are Flawed", 2023, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    products = torch.cumprod(1.0 - betas, dim=0)
    if not zero_terminal:
        return products
    roots = products.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


@dataclass(frozen=True, kw_only=True)
class SnrWeights:
    """Loss weights by signal-to-noise ratio.

    Attributes:
        min_snr_gamma: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023).
        scale_velocity: weight the loss of a velocity as that of the noise would be.
        velocity_like: add this much of the loss weighted as that of a velocity would be.
        debiased: Yu et al., "Debias the Training of Diffusion Models" (2023).
    """

    min_snr_gamma: float | None = None
    scale_velocity: bool = False
    velocity_like: float | None = None
    debiased: bool = False

    @property
    def active(self) -> bool:
        """Whether any weight differs from 1."""
        return bool(self.min_snr_gamma or self.scale_velocity or self.velocity_like or self.debiased)

    def factor(self, snr: Tensor, *, velocity: bool) -> Tensor:
        """Weight of samples with ratios `snr` [B] of a model that predicts the velocity or the noise: [B]."""
        capped = snr.clamp(max=_MOST_SNR)
        noise_like = capped / (capped + 1)
        factor = torch.ones_like(snr)
        if self.min_snr_gamma:
            factor = snr.clamp(max=self.min_snr_gamma) / (snr + 1 if velocity else snr)
        if self.scale_velocity:
            factor = factor * noise_like
        if self.velocity_like:
            factor = factor * (1 + self.velocity_like / noise_like)
        if self.debiased:
            factor = factor * (1 / (capped + 1) if velocity else capped.rsqrt())
        return factor


@dataclass(frozen=True)
class Ddpm:
    """Variance-preserving diffusion over 1000 integer timesteps; the model predicts the noise or the velocity.

    Attributes:
        min_timestep: smallest timestep drawn.
        max_timestep: one more than the largest drawn; not above `min_timestep`, it is the only one drawn.
        velocity: whether the model predicts sqrt(abar) * noise - sqrt(1 - abar) * data (Salimans and Ho, 2022).
        zero_terminal: whether the last timestep is noise alone.
        weights: of the loss.
    """

    min_timestep: int = 0
    max_timestep: int = NUM_TIMESTEPS
    velocity: bool = False
    zero_terminal: bool = False
    weights: SnrWeights = SnrWeights()

    def sample(
        self, draws: Sequence[LevelDraw], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Uniform integers in [min_timestep, max_timestep)."""
        del latent_size, offsets
        if self.min_timestep >= self.max_timestep:
            return torch.full((len(draws),), float(min(self.max_timestep, NUM_TIMESTEPS - 1))), None
        return torch.cat([draw.integer(self.min_timestep, self.max_timestep) for draw in draws]).float(), None

    def at(self, timesteps: Tensor) -> Tensor | None:
        """This process has no sigmas."""
        del timesteps

    def _signal(self, timesteps: Tensor) -> Tensor:
        """abar of each sample [B]."""
        table = alphas_cumprod(zero_terminal=self.zero_terminal).to(timesteps.device)
        return table[timesteps.long().clamp(max=NUM_TIMESTEPS - 1)]

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """sqrt(abar) * latents + sqrt(1 - abar) * noise."""
        del sigmas
        signal = per_sample(self._signal(timesteps), latents)
        return signal.sqrt() * latents + (1.0 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or the velocity."""
        if not self.velocity:
            return noise
        signal = per_sample(self._signal(timesteps), latents)
        return signal.sqrt() * noise - (1.0 - signal).sqrt() * latents

    def weight(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor | None:
        """Weight by signal-to-noise ratio, where one was asked for."""
        del sigmas
        if not self.weights.active:
            return None
        signal = self._signal(timesteps)
        # where nothing of the data is left, weights of the step before: theirs would be infinite
        lowest = alphas_cumprod(zero_terminal=self.zero_terminal)
        signal = signal.clamp(min=float(lowest[lowest > 0].min()))
        return self.weights.factor(signal / (1.0 - signal), velocity=self.velocity)

    def noise_to_signal(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """sqrt((1 - abar) / abar)."""
        del sigmas
        signal = self._signal(timesteps)
        return ((1.0 - signal) / signal).sqrt()
