"""Normalisations of queries and keys."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32; the weight is called `scale` in published files."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in the input's dtype."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normal.to(x.dtype) * self.scale.to(x.dtype)


class QKNorm(nn.Module):
    """RMS normalisation of queries and keys over the head size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised q and k in the dtype of v."""
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class WeightedRMSNorm(nn.Module):
    """As `RMSNorm`, for files that call the weight `weight`; it is multiplied in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim] in the input's dtype."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normal * self.weight.float()).to(x.dtype)
