"""Frozen layers whose weights are kept in 8-bit floats (e4m3) and widened for each use.

Every output channel has a scale of its own, so that its largest weight is the largest number of the format. Weights
that a file holds in this format already are taken as they are. The layer keeps its class: adapters find it as before.
"""

from collections.abc import Collection, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMAT = torch.float8_e4m3fn
_SCALE = "weight_scale"
_LARGEST = torch.finfo(FORMAT).max


def is_fp8(module: nn.Module) -> bool:
    """Whether the layer keeps its weight in 8 bits."""
    return _SCALE in module._buffers


def prepare_fp8(blocks: Iterable[nn.Module], skip: Collection[str] = ()) -> None:
    """Let the linear and convolution layers of blocks keep their weights in 8 bits, once these are put there.

    Args:
        blocks: modules on the meta device.
        skip: last parts of the names of layers that stay as they are.
    """
    for block in blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.rpartition(".")[2] not in skip and not is_fp8(layer):
                shape = (layer.weight.shape[0], *[1] * (layer.weight.ndim - 1))
                layer.register_buffer(_SCALE, torch.empty(shape, device=layer.weight.device), persistent=False)
                forward = _linear if isinstance(layer, nn.Linear) else _convolution
                layer.forward = MethodType(forward, layer)


def put_fp8(layer: nn.Module, weight: Tensor, device: torch.device | str) -> None:
    """Fill a prepared layer's weight.

    Args:
        layer: prepared by `prepare_fp8`.
        weight: [out, ...] of any float format.
        device: where it goes.
    """
    weight = weight.to(device)
    if weight.dtype == FORMAT:
        scale = torch.ones_like(getattr(layer, _SCALE), device=device)
    else:
        wide = weight.float()
        scale = wide.abs().amax(dim=tuple(range(1, wide.ndim)), keepdim=True).clamp(min=1e-12) / _LARGEST
        weight = (wide / scale).clamp(-_LARGEST, _LARGEST).to(FORMAT)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    layer._buffers[_SCALE] = scale


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a format that can be computed with."""
    return weight.to(dtype) * scale.to(dtype)


def _computing_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Linear(torch.autograd.Function):
    """Keeps the 8-bit weight for the backward, not the widened one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, widened(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradient @ widened(weight, scale, gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    """As `_Linear`, for two-dimensional convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.geometry = x.shape, geometry
        return functional.conv2d(x, widened(weight, scale, x.dtype), None, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        wide = widened(weight, scale, gradient.dtype)
        back = torch.nn.grad.conv2d_input(ctx.shape, wide, gradient, *ctx.geometry)
        return back, *[None] * (2 + len(ctx.geometry))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    dtype = _computing_dtype(x)
    result = _Linear.apply(x.to(dtype), layer.weight, layer.weight_scale)
    return result if layer.bias is None else result + layer.bias.to(dtype)


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    dtype = _computing_dtype(x)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    result = _Convolution.apply(x.to(dtype), layer.weight, layer.weight_scale, *geometry)
    return result if layer.bias is None else result + layer.bias.to(dtype)[:, None, None]
