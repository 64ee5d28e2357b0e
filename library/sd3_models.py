"""The MMDiT transformer of Stable Diffusion 3 and 3.5 in the layout of its published checkpoint.

Attribute paths and class names are part of the file format: adapter keys and checkpoints use them.
Shapes: B batch, L image tokens, T text tokens, D hidden size, H heads, E head size (D = H * E).
Architecture: Esser et al., "Scaling Rectified Flow Transformers" (2024); checked against diffusers'
SD3Transformer2DModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.modules.attention import attend
from library.modules.embeddings import timestep_embedding
from library.modules.norms import WeightedRMSNorm

_TIME_WIDTH = 256


@dataclass(frozen=True)
class MMDiTParams:
    """Sizes of an MMDiT transformer.

    Attributes:
        in_channels: of the latents.
        out_channels: of the prediction.
        patch_size: latent pixels per token side.
        hidden_size: D.
        num_heads: H.
        depth: joint blocks.
        mlp_size: width of the blocks' MLPs.
        context_size: width of the text states.
        pooled_size: width of the pooled text.
        pos_embed_size: rows and columns of the stored table of positions.
        qk_norm: whether queries and keys are normalised.
        dual_blocks: blocks whose image stream attends to itself a second time.
    """

    in_channels: int
    out_channels: int
    patch_size: int
    hidden_size: int
    num_heads: int
    depth: int
    mlp_size: int
    context_size: int
    pooled_size: int
    pos_embed_size: int
    qk_norm: bool = False
    dual_blocks: tuple[int, ...] = ()


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class PatchEmbed(nn.Module):
    """Latents to image tokens."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, L, D]."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class Embedder(nn.Module):
    """A vector through linear, SiLU, linear."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_size] -> [B, D]."""
        return self.mlp(x)


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself joins both streams and lives in the block."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, has_output: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        if has_output:
            self.proj = nn.Linear(dim, dim)
        self.ln_q = WeightedRMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.ln_k = WeightedRMSNorm(dim // num_heads) if qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v [B, H, L, E], q and k normalised."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype), v


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.fc2(self.act(self.fc1(x)))


class SingleDiTBlock(nn.Module):
    """The weights of one stream of a joint block.

    Args:
        params: sizes.
        pre_only: the stream is only attended to: the text of the last block.
        dual: the stream attends to itself a second time.
    """

    def __init__(self, params: MMDiTParams, *, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        size, heads = params.hidden_size, params.num_heads
        self.norm1 = _layer_norm(size)
        self.attn = SelfAttention(size, heads, qk_norm=params.qk_norm, has_output=not pre_only)
        if dual:
            self.attn2 = SelfAttention(size, heads, qk_norm=params.qk_norm)
        if not pre_only:
            self.norm2 = _layer_norm(size)
            self.mlp = Mlp(size, params.mlp_size)
        self.count = 2 if pre_only else (9 if dual else 6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, self.count * size))

    def modulation(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> vectors [B, 1, D]: shift, scale, gate of attention, of the MLP, of the second attention."""
        return self.adaLN_modulation(vec)[:, None, :].chunk(self.count, dim=-1)

    def finish(self, x: Tensor, attention: Tensor, gates: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Add attention [B, L, D] and MLP to the stream; gates: of attention, then shift, scale, gate of the MLP."""
        gate, mlp_shift, mlp_scale, mlp_gate = gates
        x = x + gate * self.attn.proj(attention)
        return x + mlp_gate * self.mlp(_modulate(self.norm2(x), mlp_shift, mlp_scale))


class JointBlock(nn.Module):
    """A block in which image and text keep weights of their own and attend to each other."""

    def __init__(self, params: MMDiTParams, *, last: bool, dual: bool) -> None:
        super().__init__()
        self.attend = attend
        self.last, self.dual = last, dual
        self.context_block = SingleDiTBlock(params, pre_only=last)
        self.x_block = SingleDiTBlock(params, dual=dual)

    def forward(self, context: Tensor, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, T, D], x [B, L, D], vec [B, D] -> the streams after the block; the last leaves the text alone."""
        text, image = self.context_block, self.x_block
        text_vectors, image_vectors = text.modulation(vec), image.modulation(vec)
        normal = image.norm1(x)
        text_heads = text.attn.heads(_modulate(text.norm1(context), *text_vectors[:2]))
        image_heads = image.attn.heads(_modulate(normal, *image_vectors[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_heads, image_heads))
        joint = self.attend(q, k, v)
        length = context.shape[1]
        if not self.last:
            context = text.finish(context, joint[:, :length], text_vectors[2:6])
        if self.dual:
            shift, scale, gate = image_vectors[6:]
            again = self.attend(*image.attn2.heads(_modulate(normal, shift, scale)))
            x = x + gate * image.attn2.proj(again)
        return context, image.finish(x, joint[:, length:], image_vectors[2:6])


class FinalLayer(nn.Module):
    """Final modulation and projection to latent patches."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, out_size]."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x), shift, scale))


class MMDiT(nn.Module):
    """The Stable Diffusion 3 transformer: latents and text in, the velocity out."""

    def __init__(self, params: MMDiTParams) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.x_embedder = PatchEmbed(params.patch_size, params.in_channels, size)
        self.t_embedder = Embedder(_TIME_WIDTH, size)
        self.y_embedder = Embedder(params.pooled_size, size)
        self.context_embedder = nn.Linear(params.context_size, size)
        self.register_buffer("pos_embed", torch.empty(1, params.pos_embed_size**2, size))
        self.joint_blocks = nn.ModuleList(
            JointBlock(params, last=index == params.depth - 1, dual=index in params.dual_blocks)
            for index in range(params.depth)
        )
        self.final_layer = FinalLayer(size, params.patch_size**2 * params.out_channels)

    def positions(self, rows: int, columns: int, corners: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Position vectors of a grid of tokens, cut from a table.

        Args:
            rows: of the grid.
            columns: of the grid.
            corners: where each image's grid begins, as shares of the room that is left [B, 2]; the middle when None.
            table: vectors [S*S, D] to cut from; the model's own when None.

        Returns:
            [B or 1, rows * columns, D].

        Raises:
            ValueError: the grid is larger than the table.
        """
        own = self.pos_embed[0] if table is None else table.to(self.pos_embed)
        side = round(own.shape[0] ** 0.5)
        if rows > side or columns > side:
            raise ValueError(f"{rows} x {columns} tokens are more than the {side} x {side} positions of this model")
        grid = own.unflatten(0, (side, side))
        if corners is None:
            top, left = (side - rows) // 2, (side - columns) // 2
            return grid[top : top + rows, left : left + columns].flatten(0, 1)[None]
        room = torch.tensor([side - rows + 1, side - columns + 1], device=corners.device)
        starts = (corners * room).long()
        tops = starts[:, :1] + torch.arange(rows, device=corners.device)
        lefts = starts[:, 1:] + torch.arange(columns, device=corners.device)
        return grid[tops[:, :, None], lefts[:, None, :]].flatten(1, 2)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Velocity of noisy latents.

        Args:
            latents: [B, C, h, w], sides divisible by the patch size.
            timesteps: noise level in 0..1000 [B] float32.
            context: text states [B, T, context_size].
            pooled: pooled text [B, pooled_size].
            positions: vectors of the image tokens [B or 1, L, D]; from the middle of the stored table when None.

        Returns:
            [B, out_channels, h, w].
        """
        patch = self.params.patch_size
        rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
        if positions is None:
            positions = self.positions(rows, columns)
        x = self.x_embedder(latents) + positions.to(latents.dtype)
        vec = self.t_embedder(timestep_embedding(timesteps, _TIME_WIDTH).to(latents.dtype)) + self.y_embedder(pooled)
        context = self.context_embedder(context)
        for block in self.joint_blocks:
            context, x = block(context, x, vec)
        x = self.final_layer(x, vec)
        return (
            x.unflatten(1, (rows, columns))
            .unflatten(-1, (patch, patch, -1))
            .permute(0, 5, 1, 3, 2, 4)
            .reshape(x.shape[0], -1, rows * patch, columns * patch)
        )


def scaled_table(hidden_size: int, patches: int, grid: int, base: int = 16) -> Tensor:
    """Sine and cosine vectors of positions on a square grid whose middle `patches` span `base` units.

    Args:
        hidden_size: D; half tells the column, half the row, each by sines and then cosines.
        patches: tokens along an image of the size that is trained.
        grid: rows and columns of the table.
        base: units that they span.

    Returns:
        [grid * grid, D] float32.
    """
    places = torch.arange(grid, dtype=torch.float64) * (base / patches) - base * (grid - patches) / (2 * patches)
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = places[:, None] * frequencies[None]
    waves = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns = waves[None].expand(grid, -1, -1)
    rows = waves[:, None].expand(-1, grid, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).float()
