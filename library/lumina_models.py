"""The transformer of Lumina Image 2.0 (NextDiT) in the layout of its published checkpoint.

Attribute paths and class names are part of the file format: adapter keys and checkpoints use them.
Shapes: B batch, C latent channels, L image tokens, T text tokens, S = T + L, D hidden size, H heads, E head size.
Architecture: Qin et al., "Lumina-Image 2.0" (2025); checked against diffusers' Lumina2Transformer2DModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from library.modules.attention import attend
from library.modules.embeddings import timestep_embedding
from library.modules.rope import apply_rope, rope_rotations

PATCH = 2
_TIME_CHANNELS = 256
_QK_EPS = 1e-6  # of queries and keys; the blocks' own normalisations have another one


@dataclass(frozen=True)
class LuminaParams:
    """Sizes of the transformer; `axes_dim` are the rotary channels of the axes (index, row, column)."""

    in_channels: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    cap_feat_dim: int
    time_size: int
    num_layers: int
    num_refiner_layers: int
    num_context_layers: int
    axes_dim: tuple[int, ...]
    theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time, then Linear, SiLU, Linear."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_CHANNELS, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """times [B] in [0, 1], not scaled, -> [B, time_size]."""
        return self.mlp(timestep_embedding(times, _TIME_CHANNELS).to(dtype))


class JointAttention(nn.Module):
    """Self-attention in which groups of query heads share a key and value head."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.attend = attend
        self.heads = (params.num_heads, params.num_kv_heads, params.num_kv_heads)
        self.repeats = params.num_heads // params.num_kv_heads
        head_size = params.head_size
        self.qkv = nn.Linear(params.hidden_size, sum(self.heads) * head_size, bias=False)
        self.out = nn.Linear(params.num_heads * head_size, params.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_size, eps=_QK_EPS)
        self.k_norm = nn.RMSNorm(head_size, eps=_QK_EPS)

    def forward(self, x: Tensor, mask: Tensor | None, rotations: Tensor) -> Tensor:
        """x [B, S, D], mask [B, 1, 1, S] bool, rotations [B, 1, S, E/2, 2, 2] -> [B, S, D]."""
        heads = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        q = apply_rope(self.q_norm(q), rotations).to(v.dtype)
        k = apply_rope(self.k_norm(k), rotations).to(v.dtype)
        k, v = (one.repeat_interleave(self.repeats, dim=1) for one in (k, v))
        return self.out(self.attend(q, k, v, mask=mask))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.w1 = nn.Linear(params.hidden_size, params.mlp_size, bias=False)
        self.w2 = nn.Linear(params.mlp_size, params.hidden_size, bias=False)
        self.w3 = nn.Linear(params.hidden_size, params.mlp_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each normalised before and after; scales and gates follow the time, if modulated."""

    def __init__(self, params: LuminaParams, *, modulated: bool) -> None:
        super().__init__()
        size = params.hidden_size
        self.modulated = modulated
        self.attention = JointAttention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm1 = nn.RMSNorm(size, eps=params.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(size, eps=params.norm_eps)
        self.attention_norm2 = nn.RMSNorm(size, eps=params.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(size, eps=params.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.time_size, 4 * size))

    def forward(self, x: Tensor, mask: Tensor | None, rotations: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, S, D], mask [B, 1, 1, S] bool, rotations [B, 1, S, E/2, 2, 2], time [B, time_size]."""
        if not self.modulated:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), mask, rotations))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(time)[:, None, :].chunk(4, dim=-1)
        hidden = self.attention(self.attention_norm1(x) * (1 + scale1), mask, rotations)
        x = x + gate1.tanh() * self.attention_norm2(hidden)
        hidden = self.feed_forward(self.ffn_norm1(x) * (1 + scale2))
        return x + gate2.tanh() * self.ffn_norm2(hidden)


class FinalLayer(nn.Module):
    """Last scaling and projection to latent patches."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.norm_final = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(size, PATCH * PATCH * params.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.time_size, size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, PATCH * PATCH * C]."""
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(time)[:, None, :]))


class NextDiT(nn.Module):
    """The transformer: noisy latents and text in, the direction from noise to image out."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.x_embedder = nn.Linear(PATCH * PATCH * params.in_channels, size)
        self.noise_refiner = self._blocks(params.num_refiner_layers, modulated=True)
        self.context_refiner = self._blocks(params.num_context_layers, modulated=False)
        self.t_embedder = TimestepEmbedder(params.time_size)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(params.cap_feat_dim, eps=params.norm_eps), nn.Linear(params.cap_feat_dim, size)
        )
        self.layers = self._blocks(params.num_layers, modulated=True)
        self.norm_final = nn.RMSNorm(size, eps=params.norm_eps)  # in every published file, used by nothing
        self.final_layer = FinalLayer(params)

    def _blocks(self, count: int, *, modulated: bool) -> nn.ModuleList:
        return nn.ModuleList(JointTransformerBlock(self.params, modulated=modulated) for _ in range(count))

    def forward(self, x: Tensor, times: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Direction from noise to image (image - noise).

        Text that is masked stays in its place: attention leaves it out, and the image's positions follow the valid
        text of each sample, so the result is that of a sequence without it.

        Args:
            x: noisy latents [B, C, H, W].
            times: 0 is pure noise, 1 the image [B].
            text: text states [B, T, cap_feat_dim], valid tokens first.
            text_mask: True where a text token is valid [B, T]; all are when None.

        Returns:
            [B, C, H, W].
        """
        batch, _, height, width = x.shape
        time = self.t_embedder(times, x.dtype)
        tokens, words = self.x_embedder(patches(x)), self.cap_embedder(text)
        if text_mask is None:
            lengths = torch.full((batch,), words.shape[1], device=x.device)
            text_seen = seen = None
        else:
            text_mask = text_mask.bool()
            lengths = text_mask.sum(dim=1)
            image_seen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
            text_seen = text_mask[:, None, None, :]
            seen = torch.cat((text_mask, image_seen), dim=1)[:, None, None, :]
        ids = positions(lengths, words.shape[1], height // PATCH, width // PATCH)
        rotations = rope_rotations(ids, self.params.axes_dim, self.params.theta)
        split = words.shape[1], tokens.shape[1]
        text_rotations, image_rotations = rotations.split(split, dim=2)
        for block in self.context_refiner:
            words = block(words, text_seen, text_rotations)
        for block in self.noise_refiner:
            tokens = block(tokens, None, image_rotations, time)
        joint = torch.cat((words, tokens), dim=1)
        for block in self.layers:
            joint = block(joint, seen, rotations, time)
        return unpatched(self.final_layer(joint[:, split[0] :], time), height, width)


def positions(lengths: Tensor, num_words: int, rows: int, columns: int) -> Tensor:
    """Positions of text (index, 0, 0) and image (number of valid words, row, column).

    Args:
        lengths: valid words of each sample [B].
        num_words: T, with those that are not valid.
        rows: of patches.
        columns: of patches.

    Returns:
        [B, T + rows * columns, 3] float32.
    """
    device = lengths.device
    text = torch.zeros(len(lengths), num_words, 3, device=device)
    text[..., 0] = torch.arange(num_words, device=device)
    image = torch.zeros(len(lengths), rows, columns, 3, device=device)
    image[..., 0] = lengths[:, None, None]
    image[..., 1] = torch.arange(rows, device=device)[:, None]
    image[..., 2] = torch.arange(columns, device=device)
    return torch.cat((text, image.flatten(1, 2)), dim=1)


def patches(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H/2)*(W/2), 4*C]: 2x2 patches, channel fastest."""
    split = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatched(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `patches` for latents of the given height and width."""
    split = tokens.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (height // PATCH, width // PATCH))
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
