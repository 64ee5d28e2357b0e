"""Scaled dot-product attention, the one place where a back end is chosen."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.base.errors import UserError
from library.base.lazy import optional_import

Attend = Callable[..., Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attention over heads.

    Args:
        q: queries [B, H, L, E].
        k: keys [B, H, S, E].
        v: values [B, H, S, E].
        mask: boolean, True where a key may be attended to, broadcast to [B, H, L, S].

    Returns:
        [B, L, H*E].
    """
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def attend_by_item(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """As `attend`, one image and one head after the other: less memory where no fused kernel runs."""
    items = []
    for item in range(q.shape[0]):
        seen = None if mask is None else mask[item if mask.shape[0] > 1 else 0][None]
        heads = [
            scaled_dot_product_attention(
                q[item, head][None, None],
                k[item, head][None, None],
                v[item, head][None, None],
                attn_mask=None if seen is None else seen[:, head if seen.shape[1] > 1 else 0][:, None],
            )
            for head in range(q.shape[1])
        ]
        items.append(torch.cat(heads, dim=1))
    return torch.cat(items).transpose(1, 2).flatten(2)


def attend_with_xformers(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """As `attend`, by xformers' kernels."""
    import xformers.ops

    bias = None
    if mask is not None:
        shape = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        bias = torch.zeros(shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    turned = (one.transpose(1, 2).contiguous() for one in (q, k, v))
    return xformers.ops.memory_efficient_attention(*turned, attn_bias=bias).flatten(2)


def attend_with_flash(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """As `attend`, by the kernels of flash-attn, which know no masks: masked batches go through PyTorch's."""
    if mask is not None:
        return attend(q, k, v, mask=mask)
    import flash_attn

    return flash_attn.flash_attn_func(*(one.transpose(1, 2) for one in (q, k, v))).flatten(2)


def attend_with_sage(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """As `attend`, by the kernels of sageattention: no gradients, no masks (masked batches go through PyTorch's)."""
    if mask is not None:
        return attend(q, k, v, mask=mask)
    import sageattention

    return sageattention.sageattn(q, k, v, tensor_layout="HND").transpose(1, 2).flatten(2)


# name -> (function, package it needs, how to install it)
BACK_ENDS: dict[str, tuple[Attend, str | None, str]] = {
    "torch": (attend, None, ""),
    "sdpa": (attend, None, ""),
    "mem_eff_attn": (attend_by_item, None, ""),
    "xformers": (attend_with_xformers, "xformers.ops", "xformers"),
    "flash": (attend_with_flash, "flash_attn", "flash-attn"),
    "sageattn": (attend_with_sage, "sageattention", "sageattention"),
}


def check_back_end(flag: str, name: str, *, trained: bool = True) -> None:
    """Stop before anything loads when a back end cannot be used here.

    Args:
        flag: that chose it.
        name: of the back end.
        trained: whether gradients are needed.

    Raises:
        UserError: its package is missing, or it cannot train.
    """
    if trained and name == "sageattn":
        message = "its kernels compute no gradients, so nothing can be trained with them; use torch, xformers or flash"
        raise UserError(flag, name, message)
    _, package, install = BACK_ENDS[name]
    if package is not None:
        optional_import(package, needed_for=flag, install=install)


def image_by_image(function: Attend) -> Attend:
    """A back end that attends within one image of the batch after the other: less memory."""

    def attend_to_one(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if q.shape[0] == 1:
            return function(q, k, v, mask=mask)
        masks = [None if mask is None else mask[item if mask.shape[0] > 1 else 0][None] for item in range(q.shape[0])]
        return torch.cat([function(*one, mask=seen) for *one, seen in zip(q.split(1), k.split(1), v.split(1), masks)])

    return attend_to_one


def use_attention(module: nn.Module, name: str, *, by_image: bool = False) -> None:
    """Let a denoiser use a back end: its parts with an attribute `attend`, or a model of diffusers by its own ways.

    Args:
        module: the denoiser.
        name: of the back end.
        by_image: attend within one image of the batch after the other; diffusers' models do not.
    """
    function = image_by_image(BACK_ENDS[name][0]) if by_image else BACK_ENDS[name][0]
    if hasattr(module, "set_attention_slice"):
        if name == "xformers":
            module.enable_xformers_memory_efficient_attention()
        elif name == "mem_eff_attn":
            module.set_attention_slice(1)
        return
    for part in module.modules():
        if "attend" in part.__dict__:
            part.attend = function
