"""Rectified flow: a straight line from data (sigma 0) to noise (sigma 1).

Sources: Liu et al., "Flow Straight and Fast" (2022); Esser et al., "Scaling Rectified Flow Transformers" (2024) for the
shifts, densities and weightings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.diffusion.noise import LevelDraw
from library.diffusion.process import per_sample

NUM_TIMESTEPS = 1000
LOGIT_SAMPLING = frozenset({"sigmoid", "shift", "flux_shift", "nextdit_shift"})
_SMALLEST = 1e-7  # noise level below which the logit of nextdit_shift is not followed


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
        sampling: how noise levels are drawn: sigma, uniform, sigmoid, shift, flux_shift, nextdit_shift.
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
        self, draws: Sequence[LevelDraw], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Draw sigmas, then restrict them to [min_sigma, max_sigma]; timesteps are 1000 * sigma.

        Offsets move the logit of what is drawn; `uniform` and `sigma` draw no logits and ignore them.
        """
        sampler = self._samplers()[self.sampling]
        tokens = (latent_size[0] // self.patch) * (latent_size[1] // self.patch)
        sigmas = torch.cat([sampler(draw, tokens) for draw in draws])
        if self.sampling in LOGIT_SAMPLING and any(offsets):
            sigmas = torch.sigmoid(torch.logit(sigmas) + torch.tensor(offsets, dtype=torch.float32))
        if (self.min_sigma, self.max_sigma) != (0.0, 1.0):
            sigmas = self.min_sigma + (self.max_sigma - self.min_sigma) * sigmas
        return sigmas * NUM_TIMESTEPS, sigmas

    def _samplers(self) -> dict[str, Callable[[LevelDraw, int], Tensor]]:
        return {
            "sigma": lambda draw, _: discrete_sigmas(self.shift)[self._density_index(draw)],
            "uniform": lambda draw, _: draw.uniform(),
            "sigmoid": lambda draw, _: self._sigmoid(draw),
            "shift": lambda draw, _: shifted(self._sigmoid(draw), self.shift),
            "flux_shift": lambda draw, tokens: time_shifted(self._sigmoid(draw), resolution_shift(tokens)),
            "nextdit_shift": lambda draw, tokens: time_shifted(
                draw.uniform().clamp(min=_SMALLEST), resolution_shift(tokens)
            ),
        }

    def _sigmoid(self, draw: LevelDraw) -> Tensor:
        return torch.sigmoid(self.sigmoid_scale * draw.normal())

    def _density(self, draw: LevelDraw) -> Tensor:
        """A number in [0, 1] with the density of `weighting_scheme`."""
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * draw.normal())
        u = draw.uniform()
        if self.weighting_scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u

    def _density_index(self, draw: LevelDraw) -> Tensor:
        """Index into the discrete noise levels."""
        return (self._density(draw) * NUM_TIMESTEPS).long().clamp(0, NUM_TIMESTEPS - 1)

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

    def noise_to_signal(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor:
        """sigma / (1 - sigma)."""
        s = timesteps / NUM_TIMESTEPS if sigmas is None else sigmas
        return s / (1.0 - s)


@dataclass(frozen=True, kw_only=True)
class DataFlow(RectifiedFlow):
    """As `RectifiedFlow`, judged by the data that the velocity leads to: noisy - sigma * velocity against data.

    Noise levels are whole steps of a thousand: a number with the density of `weighting_scheme`, shifted, rounded down.
    """

    def sample(
        self, draws: Sequence[LevelDraw], latent_size: tuple[int, int], offsets: Sequence[float] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Draw whole timesteps from min_sigma * 1000 to below max_sigma * 1000; offsets move the logit."""
        del latent_size
        u = torch.cat([self._density(draw) for draw in draws])
        if any(offsets):
            u = torch.sigmoid(torch.logit(u) + torch.tensor(offsets, dtype=torch.float32))
        low, high = self.min_sigma * NUM_TIMESTEPS, self.max_sigma * NUM_TIMESTEPS
        timesteps = (shifted(u, self.shift) * (high - low) + low).floor().clamp(max=max(low, high - 1))
        return timesteps, timesteps / NUM_TIMESTEPS

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The data."""
        del noise, timesteps
        return latents

    def weight(self, timesteps: Tensor, sigmas: Tensor | None) -> Tensor | None:
        """As of the base class; without noise the prediction is the data, whatever the model says."""
        s = timesteps / NUM_TIMESTEPS if sigmas is None else sigmas
        return super().weight(timesteps, s.clamp(min=1 / NUM_TIMESTEPS))
