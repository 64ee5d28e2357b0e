"""The only place that draws the noise of a step, from one generator per item.

Sources: Lin et al., "Diffusion with Offset Noise" (CrossLabs, 2023) for the offset; "Multi-Resolution Noise for
Diffusion Model Training" (2023) for coarser noises; Ning et al., "Input Perturbation Reduces Exposure Bias" (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from library.base.randomness import address
from library.batch import ItemAddress


def item_generators(seed: int, purpose: str, items: Sequence[ItemAddress]) -> list[Generator]:
    """A CPU generator per item, seeded by (seed, purpose, the visit's address)."""
    return [torch.Generator().manual_seed(address(seed, purpose, *item.parts())) for item in items]


def draw_noise(generators: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Unit normal noise [len(generators), *shape] float32 on the CPU: equal on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def offset_strength(strength: float, latents: Tensor, adaptive: float | None) -> float | Tensor:
    """Strength of the offset: with `adaptive`, strength + adaptive * |mean over pixels|, not below 0 [..., C, 1, 1].

    Args:
        strength: without the adaptive part.
        latents: [..., C, H, W].
        adaptive: share of the latents' mean that is added, or None.
    """
    if not adaptive:
        return strength
    mean = latents.mean(dim=(-2, -1), keepdim=True).abs()
    return (strength + adaptive * mean).clamp(min=0.0)


def coarse_size(size: tuple[int, int], ratio: float, level: int) -> tuple[int, int]:
    """(height, width) of the noise of a level: size / ratio^level, at least 1."""
    return max(1, int(size[0] / ratio**level)), max(1, int(size[1] / ratio**level))


def add_coarse(noise: Tensor, coarse: Tensor, weight: float) -> Tensor:
    """noise [C, H, W] + weight * (coarse [C, h, w] enlarged bilinearly)."""
    enlarged = functional.interpolate(coarse[None], size=noise.shape[-2:], mode="bilinear", align_corners=False)
    return noise + weight * enlarged[0]


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """What is drawn besides plain noise.

    Attributes:
        offset: strength of one value added to each channel.
        offset_random: draw that strength between 0 and `offset`, per image.
        adaptive_scale: see `offset_strength`.
        coarse_levels: how many noises of coarser and coarser size are added.
        coarse_discount: weight of a level relative to the one before it.
        perturbation: strength of further noise in the model's input which the target does not know.
        perturbation_random: draw that strength between 0 and `perturbation`, per image.
    """

    offset: float | None = None
    offset_random: bool = False
    adaptive_scale: float | None = None
    coarse_levels: int | None = None
    coarse_discount: float = 0.3
    perturbation: float | None = None
    perturbation_random: bool = False

    def draw(self, generators: Sequence[Generator], latents: Tensor) -> Tensor:
        """Noise for latents [B, C, H, W], each item from its own generator: [B, C, H, W] float32 on the CPU."""
        plain = draw_noise(generators, latents.shape[1:])
        if not self.offset and not self.coarse_levels:
            return plain
        return torch.stack([self._changed(*item) for item in zip(generators, plain, latents.float())])

    def _changed(self, generator: Generator, noise: Tensor, latents: Tensor) -> Tensor:
        if self.offset:
            strength = self.offset * (torch.rand(1, generator=generator).item() if self.offset_random else 1.0)
            values = torch.randn(latents.shape[0], 1, 1, generator=generator)
            noise = noise + offset_strength(strength, latents, self.adaptive_scale) * values
        if self.coarse_levels:
            noise = self._with_coarser(generator, noise)
        return noise

    def _with_coarser(self, generator: Generator, noise: Tensor) -> Tensor:
        """Noise and coarser noises, brought back to unit deviation; of this image alone, whatever its batch."""
        for level in range(self.coarse_levels or 0):
            ratio = 2.0 + 2.0 * torch.rand(1, generator=generator).item()
            size = coarse_size((noise.shape[-2], noise.shape[-1]), ratio, level)
            coarse = torch.randn(noise.shape[0], *size, generator=generator)
            noise = add_coarse(noise, coarse, self.coarse_discount**level)
            if 1 in size:
                break
        return noise / noise.std()

    def perturbed(self, generators: Sequence[Generator], noise: Tensor) -> Tensor:
        """The noise of the model's input [B, C, H, W]; the same as `noise` without a perturbation."""
        if not self.perturbation:
            return noise
        strengths = [
            self.perturbation * (torch.rand(1, generator=generator).item() if self.perturbation_random else 1.0)
            for generator in generators
        ]
        further = draw_noise(generators, noise.shape[1:])
        return noise + torch.tensor(strengths).view(-1, *[1] * (noise.ndim - 1)) * further


class LevelDraw:
    """What one item draws its noise level from.

    Args:
        generator: of the item.
        stratum: (k, n): uniform draws come from [k/n, (k+1)/n) and normal ones from the normal quantiles of these.
    """

    def __init__(self, generator: Generator, stratum: tuple[int, int] | None = None) -> None:
        self.generator = generator
        self.stratum = stratum

    def uniform(self) -> Tensor:
        """[1] float32 in [0, 1)."""
        value = torch.rand(1, generator=self.generator)
        if self.stratum is None:
            return value
        index, count = self.stratum
        return ((index + value) / count).clamp(max=1 - 2**-24)

    def normal(self) -> Tensor:
        """[1] float32, unit normal."""
        if self.stratum is None:
            return torch.randn(1, generator=self.generator)
        return torch.special.ndtri(self.uniform().clamp(min=2**-24))

    def integer(self, low: int, high: int) -> Tensor:
        """[1] int64 in [low, high)."""
        if self.stratum is None:
            return torch.randint(low, high, (1,), generator=self.generator)
        return (low + (high - low) * self.uniform().double()).long()


def strata(seed: int, epoch: int, first: int, size: int, count: int) -> list[tuple[int, int]]:
    """Strata (k, count) of the visits first..first+size-1 of an epoch: every `count` visits see each k once.

    Args:
        seed: of the run.
        epoch: from 1.
        first: number of the first visit in the epoch.
        size: how many visits.
        count: strata in all.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for visit in range(first, first + size):
        turn, place = divmod(visit, count)
        if turn not in orders:
            generator = torch.Generator().manual_seed(address(seed, "strata", epoch, turn))
            orders[turn] = torch.randperm(count, generator=generator).tolist()
        chosen.append((orders[turn][place], count))
    return chosen
