"""The only place that draws the noise of a step, from one generator per item."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from library.base.randomness import address
from library.batch import ItemAddress


def item_generators(seed: int, purpose: str, items: Sequence[ItemAddress]) -> list[Generator]:
    """A CPU generator per item, seeded by (seed, purpose, the visit's address)."""
    return [torch.Generator().manual_seed(address(seed, purpose, *item.parts())) for item in items]


def draw_noise(generators: Sequence[Generator], shape: Sequence[int]) -> Tensor:
    """Unit normal noise [len(generators), *shape] float32 on the CPU: equal on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
