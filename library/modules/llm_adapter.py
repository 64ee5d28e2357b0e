"""The text adapter inside Anima's transformer file: T5 tokens ask, the states of a language model answer.

Attribute paths and class names are part of the file format.
Shapes: B batch, T T5 tokens, S tokens of the language model, M width, H heads, E head size (M = H * E).
Checked against diffusers' AnimaTextConditioner.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.modules.attention import attend
from library.modules.norms import WeightedRMSNorm
from library.modules.rope import apply_rope_halves, rope_table

Table = tuple[Tensor, Tensor]  # cosines, sines [L, E/2]


@dataclass(frozen=True)
class LLMAdapterParams:
    """Sizes of the adapter: states of the language model in, states of `target_dim` out."""

    source_dim: int
    target_dim: int
    model_dim: int
    mlp_dim: int
    num_heads: int
    depth: int
    vocab_size: int
    theta: float = 10_000.0


class LLMAdapterAttention(nn.Module):
    """Attention with normalised, rotated queries and keys."""

    def __init__(self, query_dim: int, context_dim: int, num_heads: int, head_size: int) -> None:
        super().__init__()
        inner = num_heads * head_size
        self.num_heads = num_heads
        self.attend = attend
        self.q_proj = nn.Linear(query_dim, inner, bias=False)
        self.q_norm = WeightedRMSNorm(head_size)
        self.k_proj = nn.Linear(context_dim, inner, bias=False)
        self.k_norm = WeightedRMSNorm(head_size)
        self.v_proj = nn.Linear(context_dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, query_dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor, here: Table, there: Table) -> Tensor:
        """x [B, T, M] attends to context [B, S, C] where mask [B, 1, 1, S] is true; tables of both positions."""
        q, k, v = (
            one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for one in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.o_proj(self.attend(apply_rope_halves(q, *here), apply_rope_halves(k, *there), v, mask=mask))


class LLMAdapterTransformerBlock(nn.Module):
    """Self-attention over T5 tokens, cross-attention to the language model, MLP; each added to its input."""

    def __init__(self, params: LLMAdapterParams) -> None:
        super().__init__()
        size = params.model_dim
        heads = params.num_heads, size // params.num_heads
        self.norm_self_attn = WeightedRMSNorm(size)
        self.self_attn = LLMAdapterAttention(size, size, *heads)
        self.norm_cross_attn = WeightedRMSNorm(size)
        self.cross_attn = LLMAdapterAttention(size, params.source_dim, *heads)
        self.norm_mlp = WeightedRMSNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, params.mlp_dim), nn.GELU(), nn.Linear(params.mlp_dim, size))

    def forward(
        self, x: Tensor, source: Tensor, mask: Tensor, source_mask: Tensor, here: Table, there: Table
    ) -> Tensor:
        """x [B, T, M], source [B, S, C]; masks [B, 1, 1, T] and [B, 1, 1, S], tables of both positions."""
        normal = self.norm_self_attn(x)
        x = x + self.self_attn(normal, normal, mask, here, here)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, source_mask, here, there)
        return x + self.mlp(self.norm_mlp(x))


class LLMAdapter(nn.Module):
    """T5 token ids and states of the language model -> text states that the transformer reads."""

    def __init__(self, params: LLMAdapterParams) -> None:
        super().__init__()
        self.params = params
        self.embed = nn.Embedding(params.vocab_size, params.target_dim)
        same = params.model_dim == params.target_dim
        self.in_proj = nn.Identity() if same else nn.Linear(params.target_dim, params.model_dim)
        self.blocks = nn.ModuleList(LLMAdapterTransformerBlock(params) for _ in range(params.depth))
        self.out_proj = nn.Linear(params.model_dim, params.target_dim)
        self.norm = WeightedRMSNorm(params.target_dim)

    def forward(self, source: Tensor, source_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states; rows of padding are exact zeros.

        Args:
            source: states of the language model, zero where `source_mask` is [B, S, C].
            source_mask: 1 = a real token [B, S].
            ids: T5 tokens [B, T].
            mask: 1 = a real token [B, T].

        Returns:
            [B, T, target_dim].
        """
        x = self.in_proj(self.embed(ids).to(source.dtype))
        head_size = self.params.model_dim // self.params.num_heads
        here, there = (
            rope_table(torch.arange(one.shape[1], device=x.device), head_size, self.params.theta) for one in (x, source)
        )
        kept, seen = mask.bool(), source_mask.bool()
        # an empty text has no token to attend to; its states are zeros, so seeing all of them gives zeros as well
        seen = seen | ~seen.any(dim=-1, keepdim=True)
        for block in self.blocks:
            x = block(x, source, kept[:, None, None], seen[:, None, None], here, there)
        return self.norm(self.out_proj(x)).masked_fill(~kept[..., None], 0.0)
