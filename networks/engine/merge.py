"""Adding adapters to the weights they adapt."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from networks.engine.modules import weight_product


@torch.no_grad()
def stored_delta(weights: Mapping[str, Tensor], name: str, device: torch.device | str | None = None) -> Tensor | None:
    """Weight change of a stored module at multiplier 1, float32; None when the file lacks it.

    Args:
        weights: tensors of an adapter file.
        name: key prefix of the module.
        device: where to compute.
    """
    if f"{name}.lora_down.weight" not in weights:
        return None
    down = weights[f"{name}.lora_down.weight"].to(device, torch.float32)
    up = weights[f"{name}.lora_up.weight"].to(device, torch.float32)
    alpha = weights.get(f"{name}.alpha")
    rank = down.shape[0]
    return weight_product(up, down) * ((float(alpha) if alpha is not None else rank) / rank)


@torch.no_grad()
def add_to_weight(
    layer: nn.Module,
    change: Tensor,
    *,
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Add a change to a layer's weight, in float32; the result passes through `dtype` and keeps the layer's own.

    Args:
        layer: a linear or convolution layer.
        change: [out, in] or [out, in, kh, kw].
        name: for messages.
        dtype: format the sum is rounded to on the way, e.g. the precision of training; none when None.
        device: where to compute; the weight's device when None.

    Raises:
        UserError: the layer is quantized.
    """
    weight = layer.weight
    quantized = not weight.dtype.is_floating_point or weight.itemsize == 1
    if quantized or weight.numel() != change.numel() or type(layer).__name__.endswith("4bit"):
        raise UserError(
            name, message=f"cannot merge into a quantized layer ({type(layer).__name__}); merge before quantizing"
        )
    place = device or weight.device
    merged = weight.to(place, torch.float32) + change.to(place, torch.float32).reshape(weight.shape)
    weight.data.copy_(merged.to(dtype or weight.dtype))
