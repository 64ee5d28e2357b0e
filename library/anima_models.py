"""The Anima transformer (Cosmos Predict2 with a text adapter) in the layout of its published checkpoint.

Attribute paths and class names are part of the file format: adapter keys and checkpoints use them.
Shapes: B batch, L image tokens, T text tokens, D hidden size, H heads, E head size (D = H * E).
Architecture: NVIDIA's Cosmos Predict2 (2025), checked against diffusers' CosmosTransformer3DModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.modules.attention import attend
from library.modules.embeddings import timestep_embedding
from library.modules.llm_adapter import LLMAdapter, LLMAdapterParams
from library.modules.norms import WeightedRMSNorm
from library.modules.rope import apply_rope_halves, rope_table

PATCH = 2  # latent pixels per token side
_BASE = 10_000.0


@dataclass(frozen=True)
class AnimaParams:
    """Sizes of an Anima transformer.

    Attributes:
        in_channels: of the latents, without the padding mask's channel.
        out_channels: of the latents.
        hidden_size: width of the tokens.
        mlp_size: width inside the MLPs.
        num_heads: attention heads.
        depth: blocks.
        context_dim: width of the text states.
        adaln_dim: width inside the modulation.
        rope_scale: stretching of the rotary frequencies of frames, rows and columns.
        adapter: sizes of the text adapter.
    """

    in_channels: int
    out_channels: int
    hidden_size: int
    mlp_size: int
    num_heads: int
    depth: int
    context_dim: int
    adaln_dim: int
    rope_scale: tuple[float, float, float]
    adapter: LLMAdapterParams


def _modulation(size: int, inner: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(size, inner, bias=False), nn.Linear(inner, parts * size, bias=False))


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Attention(nn.Module):
    """Attention to the tokens themselves or to the text, with normalised queries and keys."""

    def __init__(self, size: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.q_proj = nn.Linear(size, size, bias=False)
        self.q_norm = WeightedRMSNorm(size // num_heads)
        self.k_proj = nn.Linear(context_dim, size, bias=False)
        self.k_norm = WeightedRMSNorm(size // num_heads)
        self.v_proj = nn.Linear(context_dim, size, bias=False)
        self.output_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """x [B, L, D], context [B, S, C] -> [B, L, D]; cos and sin [L, E/2] rotate queries and keys."""
        q, k, v = (
            one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for one in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cos is not None and sin is not None:
            q, k = apply_rope_halves(q, cos, sin), apply_rope_halves(k, cos, sin)
        return self.output_proj(self.attend(q, k, v))


class GPT2FeedForward(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(size, inner, bias=False)
        self.activation = nn.GELU()
        self.layer2 = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.layer2(self.activation(self.layer1(x)))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each modulated by the noise level and gated."""

    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        size, inner = params.hidden_size, params.adaln_dim
        self.layer_norm_self_attn = _layer_norm(size)
        self.self_attn = Attention(size, size, params.num_heads)
        self.layer_norm_cross_attn = _layer_norm(size)
        self.cross_attn = Attention(size, params.context_dim, params.num_heads)
        self.layer_norm_mlp = _layer_norm(size)
        self.mlp = GPT2FeedForward(size, params.mlp_size)
        self.adaln_modulation_self_attn = _modulation(size, inner, 3)
        self.adaln_modulation_cross_attn = _modulation(size, inner, 3)
        self.adaln_modulation_mlp = _modulation(size, inner, 3)

    def forward(self, x: Tensor, emb: Tensor, shared: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block.

        Args:
            x: image tokens [B, L, D].
            emb: embedded noise level [B, D].
            shared: modulation that all blocks share [B, 3*D].
            context: text states [B, T, context_dim]; padding is zeros and takes part.
            cos: rotary table of the image tokens [L, E/2] float32.
            sin: the same.
        """
        shift, scale, gate = _triple(self.adaln_modulation_self_attn, emb, shared)
        normal = self.layer_norm_self_attn(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(normal, normal, cos, sin)
        shift, scale, gate = _triple(self.adaln_modulation_cross_attn, emb, shared)
        x = x + gate * self.cross_attn(self.layer_norm_cross_attn(x) * (1 + scale) + shift, context)
        shift, scale, gate = _triple(self.adaln_modulation_mlp, emb, shared)
        return x + gate * self.mlp(self.layer_norm_mlp(x) * (1 + scale) + shift)


def _triple(modulation: nn.Module, emb: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate [B, 1, D]."""
    return (modulation(emb) + shared)[:, None].chunk(3, dim=-1)


class Patches(nn.Module):
    """Latents to rows of (channel, row in the patch, column in the patch)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, C * 4]."""
        batch, channels, height, width = x.shape
        parts = x.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Patches(), nn.Linear(channels * PATCH * PATCH, size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, D]."""
        return self.proj(x)


class Timesteps(nn.Module):
    """Sinusoidal embedding of the noise level."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, times: Tensor) -> Tensor:
        """[B] -> [B, D] float32."""
        return timestep_embedding(times, self.size)


class TimestepEmbedding(nn.Module):
    """The modulation that all blocks share."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(size, size, bias=False)
        self.activation = nn.SiLU()
        self.linear_2 = nn.Linear(size, 3 * size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, 3*D]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class FinalLayer(nn.Module):
    """Final modulation and projection to latent patches."""

    def __init__(self, size: int, adaln_dim: int, out_features: int) -> None:
        super().__init__()
        self.layer_norm = _layer_norm(size)
        self.linear = nn.Linear(size, out_features, bias=False)
        self.adaln_modulation = _modulation(size, adaln_dim, 2)

    def forward(self, x: Tensor, emb: Tensor, shared: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, out_features]."""
        shift, scale = (self.adaln_modulation(emb) + shared[:, : 2 * x.shape[-1]])[:, None].chunk(2, dim=-1)
        return self.linear(self.layer_norm(x) * (1 + scale) + shift)


class Anima(nn.Module):
    """The transformer with its text adapter: latents and text in, the velocity out.

    Rotary tables are computed in float64 for each call; the files' `pos_embedder` buffers are not used, because half
    precision rounds them to angles that are up to 0.1 rad off.
    """

    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.x_embedder = PatchEmbed(params.in_channels + 1, size)
        self.t_embedder = nn.Sequential(Timesteps(size), TimestepEmbedding(size))
        self.t_embedding_norm = WeightedRMSNorm(size)
        self.llm_adapter = LLMAdapter(params.adapter)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.depth))
        self.final_layer = FinalLayer(size, params.adaln_dim, params.out_channels * PATCH * PATCH)

    def text_states(self, source: Tensor, source_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What cross-attention reads [B, T, context_dim]; arguments as `LLMAdapter.forward`."""
        return self.llm_adapter(source, source_mask, ids, mask)

    def rotary_tables(self, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows * columns, E/2] float32 of the channels of frame, row and column."""
        head_size = self.params.hidden_size // self.params.num_heads
        side = head_size // 6 * 2
        sizes = head_size - 2 * side, side, side
        places = (
            torch.zeros(rows * columns, device=device),
            torch.arange(rows, device=device).repeat_interleave(columns),
            torch.arange(columns, device=device).repeat(rows),
        )
        tables = [
            rope_table(place, dim, _BASE * scale ** (dim / (dim - 2)))
            for place, dim, scale in zip(places, sizes, self.params.rope_scale, strict=True)
        ]
        cos, sin = zip(*tables, strict=True)
        return torch.cat(cos, dim=-1), torch.cat(sin, dim=-1)

    def forward(
        self, x: Tensor, times: Tensor, source: Tensor, source_mask: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        """Velocity of latents.

        Args:
            x: noisy latents [B, C, H, W], sides multiples of 2.
            times: noise level in [0, 1], 1 is pure noise [B] float32.
            source: states of the language model [B, S, source_dim].
            source_mask: 1 = a real token [B, S].
            ids: T5 tokens [B, T].
            mask: 1 = a real token [B, T].

        Returns:
            [B, C, H, W].
        """
        return self.denoise(x, times, self.text_states(source, source_mask, ids, mask))

    def denoise(self, x: Tensor, times: Tensor, context: Tensor) -> Tensor:
        """As `forward`, with the text states [B, T, context_dim] that `text_states` makes."""
        height, width = x.shape[2:]
        embedded = self.t_embedder[0](times).to(x.dtype)
        shared = self.t_embedder[1](embedded)
        emb = self.t_embedding_norm(embedded)
        cos, sin = self.rotary_tables(height // PATCH, width // PATCH, x.device)
        no_padding = torch.zeros_like(x[:, :1])
        tokens = self.x_embedder(torch.cat((x, no_padding), dim=1))
        for block in self.blocks:
            tokens = block(tokens, emb, shared, context, cos, sin)
        return unpatched(self.final_layer(tokens, emb, shared), height, width)


def unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, L, 4 * C] of (row in the patch, column in the patch, channel) -> [B, C, H, W]: not the order of `Patches`."""
    batch = tokens.shape[0]
    parts = tokens.view(batch, height // PATCH, width // PATCH, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(batch, -1, height, width)
