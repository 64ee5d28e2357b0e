"""Masks of what an inpainting model has to make anew, drawn per step: clouds, polygons, rectangles, ellipses, pairs."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional


def _between(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1, generator=generator).item()


def _grid(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of every pixel's centre, 0..1: two [h, w]."""
    rows = (torch.arange(size[0]) + 0.5) / size[0]
    columns = (torch.arange(size[1]) + 0.5) / size[1]
    return torch.meshgrid(rows, columns, indexing="ij")


def _distances(generator: Generator, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Distance from a drawn centre in units of drawn half sides: two [h, w]."""
    y, x = _grid(size)
    row, column = _between(generator, 0.1, 0.9), _between(generator, 0.1, 0.9)
    height, width = _between(generator, 0.1, 0.5), _between(generator, 0.1, 0.5)
    return (y - row) / height, (x - column) / width


def _rectangle(generator: Generator, size: tuple[int, int]) -> Tensor:
    y, x = _distances(generator, size)
    return (y.abs() < 1) & (x.abs() < 1)


def _ellipse(generator: Generator, size: tuple[int, int]) -> Tensor:
    y, x = _distances(generator, size)
    return y.square() + x.square() < 1


def _polygon(generator: Generator, size: tuple[int, int]) -> Tensor:
    """A star of corners around a centre; between two corners the radius changes evenly."""
    y, x = _distances(generator, size)
    corners = 3 + int(torch.randint(0, 8, (1,), generator=generator))
    radii = 0.3 + 0.9 * torch.rand(corners, generator=generator)
    place = (torch.atan2(y, x) / (2 * math.pi) + 0.5) * corners
    before = place.floor().long() % corners
    share = place - place.floor()
    radius = radii[before] * (1 - share) + radii[(before + 1) % corners] * share
    return y.square() + x.square() < radius.square()


def _cloud(generator: Generator, size: tuple[int, int]) -> Tensor:
    """Coarse noise above a drawn share of its values."""
    coarse = int(torch.randint(3, 9, (1,), generator=generator))
    noise = torch.randn(1, 1, coarse, coarse, generator=generator)
    smooth = functional.interpolate(noise, size=size, mode="bicubic", align_corners=False)[0, 0]
    return smooth > torch.quantile(smooth.flatten()[:: max(1, smooth.numel() // 4096)], _between(generator, 0.3, 0.8))


_SHAPES: tuple[Callable[[Generator, tuple[int, int]], Tensor], ...] = (_rectangle, _ellipse, _polygon, _cloud)


def draw_mask(generator: Generator, size: tuple[int, int]) -> Tensor:
    """A mask [h, w] float32: 1 where the image is to be made anew, 0 where it is kept.

    One shape out of four, or in a fifth of the cases two of them together.

    Args:
        generator: of the image.
        size: (height, width) in pixels.
    """
    kind = int(torch.randint(0, len(_SHAPES) + 1, (1,), generator=generator))
    if kind < len(_SHAPES):
        return _SHAPES[kind](generator, size).float()
    pair = torch.randint(0, len(_SHAPES), (2,), generator=generator).tolist()
    return (_SHAPES[pair[0]](generator, size) | _SHAPES[pair[1]](generator, size)).float()
