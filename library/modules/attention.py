"""Scaled dot-product attention, the one place where a back end is chosen."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
