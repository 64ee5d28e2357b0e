"""Rotary position embedding over several axes, interleaved pairs.

Source: Su et al., "RoFormer" (2021), applied per axis to its share of the head's channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_rotations(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Tensor:
    """Rotation matrices of positions.

    Args:
        ids: positions, one column per axis [B, L, A].
        axes_dim: channels of each axis; their sum is the head size E.
        theta: base of the frequencies.

    Returns:
        [B, 1, L, E/2, 2, 2] float32: ((cos, -sin), (sin, cos)) per channel pair.
    """
    parts = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles = ids[..., axis].double()[..., None] * (1.0 / theta**exponents)
        cos, sin = angles.cos(), angles.sin()
        parts.append(torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)))
    return torch.cat(parts, dim=-3).float()[:, None]


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of [B, H, L, E] in float32; the result has the input's dtype."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    turned = rotations[..., 0] * pairs[..., 0] + rotations[..., 1] * pairs[..., 1]
    return turned.flatten(-2).to(x.dtype)


def apply_rope_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel c with channel c + E/2 in float32; the result has the input's dtype.

    Args:
        x: [B, H, L, E].
        cos: cosines of the angles [L, E/2], float32.
        sin: sines of the same angles.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, dim/2] float32 of positions [L] times theta^(-2k/dim), computed in float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double()[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()
