"""The denoising diffusion process of Stable Diffusion (Ho et al., 2020) with its scaled-linear schedule."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from library.diffusion.process import per_sample

NUM_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


def alphas_cumprod() -> Tensor:
    """Products of 1 - beta over the schedule beta_t = linspace(sqrt(start), sqrt(end))^2: [1000] float32."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class Ddpm:
    """Variance-preserving diffusion over 1000 integer timesteps; the model predicts the noise.

    Attributes:
        min_timestep: smallest timestep drawn.
        max_timestep: one more than the largest drawn; not above `min_timestep`, it is the only one drawn.
    """

    min_timestep: int = 0
    max_timestep: int = NUM_TIMESTEPS

    def sample(
        self, generators: Sequence[Generator], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Uniform integers in [min_timestep, max_timestep)."""
        del latent_size, offsets
        if self.min_timestep >= self.max_timestep:
            return torch.full((len(generators),), float(min(self.max_timestep, NUM_TIMESTEPS - 1))), None
        draws = [torch.randint(self.min_timestep, self.max_timestep, (1,), generator=g) for g in generators]
        return torch.cat(draws).float(), None

    def at(self, timesteps: Tensor) -> Tensor | None:
        """This process has no sigmas."""
        del timesteps

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """sqrt(abar) * latents + sqrt(1 - abar) * noise."""
        del sigmas
        signal = per_sample(alphas_cumprod().to(latents.device)[timesteps.long()], latents)
        return signal.sqrt() * latents + (1.0 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise."""
        del latents, timesteps
        return noise

    def weight(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor | None:
        """All timesteps count alike."""
        del timesteps, sigmas
