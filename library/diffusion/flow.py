"""Rectified flow: a straight line from data (sigma 0) to noise (sigma 1).

Sources: Liu et al., "Flow Straight and Fast" (2022); Esser et al., "Scaling Rectified Flow Transformers" (2024) for the
shifts, densities and weightings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from library.diffusion.process import per_sample

NUM_TIMESTEPS = 1000
LOGIT_SAMPLING = frozenset({"sigmoid", "shift", "flux_shift"})


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """shift * s / (1 + (shift - 1) * s): moves noise levels towards noise for shift > 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(num_tokens: int) -> float:
    """mu of the resolution-dependent shift: linear through (256 tokens, 0.5) and (4096 tokens, 1.15)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * num_tokens + (0.5 - slope * 256)


def time_shifted(sigmas: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/s - 1); sigma 0 stays 0."""
    factor = math.exp(mu)
    return factor * sigmas / (factor * sigmas + 1 - sigmas)


def discrete_sigmas(shift: float) -> Tensor:
    """The 1000 training noise levels, from 1 down to 1/1000, shifted: [1000] float32."""
    steps = torch.linspace(1, NUM_TIMESTEPS, NUM_TIMESTEPS, dtype=torch.float32).flip(0) / NUM_TIMESTEPS
    return shifted(steps, shift)


def loss_weighting(scheme: str, sigmas: Tensor) -> Tensor | None:
    """Weight per sample: `sigma_sqrt` s^-2, `cosmap` 2/(pi*(1 - 2s + 2s^2)), None (1) for the others."""
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return None


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x = (1 - sigma) * data + sigma * noise; the model predicts the velocity noise - data.

    Attributes:
        sampling: how noise levels are drawn: sigma, uniform, sigmoid, shift, flux_shift.
        weighting_scheme: density of `sigma` sampling, and the loss weight where `weighted`.
        weighted: whether `weighting_scheme` weights the loss.
        patch: latent pixels per token side, for the resolution-dependent shift.
    """

    sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighted: bool = False
    patch: int = 2
    min_sigma: float = 0.0
    max_sigma: float = 1.0

    def sample(
        self, generators: Sequence[Generator], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sigmas, then restrict them to [min_sigma, max_sigma]; timesteps are 1000 * sigma.

        Offsets move the logit of what is drawn; `uniform` and `sigma` draw no logits and ignore them.
        """
        draw = self._samplers()[self.sampling]
        tokens = (latent_size[0] // self.patch) * (latent_size[1] // self.patch)
        sigmas = torch.cat([draw(generator, tokens) for generator in generators])
        if self.sampling in LOGIT_SAMPLING and any(offsets):
            sigmas = torch.sigmoid(torch.logit(sigmas) + torch.tensor(offsets, dtype=torch.float32))
        if (self.min_sigma, self.max_sigma) != (0.0, 1.0):
            sigmas = self.min_sigma + (self.max_sigma - self.min_sigma) * sigmas
        return sigmas * NUM_TIMESTEPS, sigmas

    def _samplers(self) -> dict[str, Callable[[Generator, int], Tensor]]:
        return {
            "sigma": lambda g, _: discrete_sigmas(self.shift)[self._density_index(g)],
            "uniform": lambda g, _: torch.rand(1, generator=g),
            "sigmoid": lambda g, _: self._sigmoid(g),
            "shift": lambda g, _: shifted(self._sigmoid(g), self.shift),
            "flux_shift": lambda g, tokens: time_shifted(self._sigmoid(g), resolution_shift(tokens)),
        }

    def _sigmoid(self, generator: Generator) -> Tensor:
        return torch.sigmoid(self.sigmoid_scale * torch.randn(1, generator=generator))

    def _density_index(self, generator: Generator) -> Tensor:
        """Index into the discrete noise levels, drawn with the density of `weighting_scheme`."""
        if self.weighting_scheme == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(1, generator=generator))
        else:
            u = torch.rand(1, generator=generator)
            if self.weighting_scheme == "mode":
                u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return (u * NUM_TIMESTEPS).long().clamp(0, NUM_TIMESTEPS - 1)

    def at(self, timesteps: Tensor) -> Tensor | None:
        """timesteps / 1000."""
        return timesteps / NUM_TIMESTEPS

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """(1 - sigma) * latents + sigma * noise."""
        s = per_sample(timesteps / NUM_TIMESTEPS if sigmas is None else sigmas, latents)
        return (1.0 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """noise - latents."""
        del timesteps
        return noise - latents

    def weight(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor | None:
        """Loss weight per sample where the family applies one."""
        if not self.weighted:
            return None
        return loss_weighting(self.weighting_scheme, timesteps / NUM_TIMESTEPS if sigmas is None else sigmas)
