"""Chroma in the layout of its published checkpoint: FLUX.1's blocks, whose modulation another network makes.

Shapes: B batch, L image tokens, T text tokens, D hidden size, N modulation vectors.
Architecture: the published model description of Chroma; checked against diffusers' ChromaTransformer2DModel.
"""

import torch
from torch import Tensor, nn

from library.flux_models import DoubleStreamBlock, FluxParams, SingleStreamBlock
from library.modules.embeddings import MLPEmbedder, timestep_embedding
from library.modules.norms import RMSNorm
from library.modules.rope import rope_rotations

_LEVEL_WIDTH = 16  # sinusoids of the noise level, and of the guidance
_INDEX_WIDTH = 32  # sinusoids of the vector's number


class GivenModulation(nn.Module):
    """Some of the vectors that a block is given: it has no weights of its own."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.rows = slice(first, first + count)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, rows, D] -> `count` times [B, 1, D]."""
        return vec[:, self.rows].split(1, dim=1)


class Approximator(nn.Module):
    """Every modulation vector of the transformer, from noise level, guidance and the vector's number."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int, depth: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_size, hidden_size)
        self.layers = nn.ModuleList(MLPEmbedder(hidden_size, hidden_size) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(hidden_size) for _ in range(depth))
        self.out_proj = nn.Linear(hidden_size, out_size)

    def forward(self, times: Tensor, guidance: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """times [B] in [0, 1], guidance [B] -> [B, count, D]."""
        levels = [timestep_embedding(1000.0 * value, _LEVEL_WIDTH) for value in (times, guidance)]
        numbers = torch.arange(count, dtype=torch.float32, device=times.device)
        numbers = timestep_embedding(1000.0 * numbers, _INDEX_WIDTH)[None].expand(times.shape[0], -1, -1)
        both = torch.cat(levels, dim=-1)[:, None].expand(-1, count, -1)
        x = self.in_proj(torch.cat((both, numbers), dim=-1).to(dtype))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.out_proj(x)


class LastLayer(nn.Module):
    """Projection to latent patches after a given shift and scale."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_channels)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, L, D] and [B, 2, D] -> [B, L, out_channels]."""
        shift, scale = vec.split(1, dim=1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


class Chroma(nn.Module):
    """The Chroma transformer: packed latents and text in, the velocity of each patch out.

    Args:
        params: sizes of the blocks; those of embeddings are not read.
        approximator: input size, hidden size and depth of the network that makes the modulation vectors.
    """

    def __init__(self, params: FluxParams, approximator: tuple[int, int, int]) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, size)
        in_size, width, depth = approximator
        self.distilled_guidance_layer = Approximator(in_size, width, size, depth)
        self.txt_in = nn.Linear(params.context_in_dim, size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(
                size,
                params.num_heads,
                params.mlp_ratio,
                qkv_bias=params.qkv_bias,
                modulations=(GivenModulation(0, 6), GivenModulation(6, 6)),
            )
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(size, params.num_heads, params.mlp_ratio, modulation=GivenModulation(0, 3))
            for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(size, params.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        times: Tensor,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of packed latents; arguments as of `Flux.forward`, of which `pooled` is not read.

        Of the padding of each text one token may be attended to, as in training of the published model.
        """
        del pooled
        if guidance is None:
            guidance = torch.zeros_like(times)
        depth, single = len(self.double_blocks), len(self.single_blocks)
        count = 3 * single + 12 * depth + 2
        vectors = self.distilled_guidance_layer(times, guidance, count, img.dtype)
        single_vectors, image_vectors, text_vectors, last = vectors.split((3 * single, 6 * depth, 6 * depth, 2), dim=1)
        img, txt = self.img_in(img), self.txt_in(txt)
        rotations = rope_rotations(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        mask = None if txt_mask is None else _attended(txt_mask, img.shape[1])
        for index, block in enumerate(self.double_blocks):
            rows = slice(6 * index, 6 * index + 6)
            vec = torch.cat((image_vectors[:, rows], text_vectors[:, rows]), dim=1)
            img, txt = block(img, txt, vec, rotations, mask)
        joint = torch.cat((txt, img), dim=1)
        for index, block in enumerate(self.single_blocks):
            joint = block(joint, single_vectors[:, 3 * index : 3 * index + 3], rotations, mask)
        return self.final_layer(joint[:, txt.shape[1] :], last)


def _attended(txt_mask: Tensor, num_image_tokens: int) -> Tensor:
    """Text mask [B, T] -> keys that may be attended to [B, 1, 1, T + num_image_tokens]."""
    places = torch.arange(txt_mask.shape[1], device=txt_mask.device)
    text = places[None] <= txt_mask.long().sum(dim=1, keepdim=True)
    return nn.functional.pad(text, (0, num_image_tokens), value=True)[:, None, None, :]
