"""FLUX.1 (dev, schnell) in the layout of its published checkpoint.

Attribute paths and class names are part of the file format: adapter keys and checkpoints use them.
Shapes: B batch, L image tokens, T text tokens, D hidden size, H heads, E head size (D = H * E).
Architecture: the published model description of FLUX.1; checked against diffusers' FluxTransformer2DModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.modules.attention import attend
from library.modules.embeddings import MLPEmbedder, timestep_embedding
from library.modules.norms import QKNorm
from library.modules.rope import apply_rope, rope_rotations


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a FLUX transformer; `axes_dim` are the rotary channels of the axes (index, row, column)."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True


class Modulation(nn.Module):
    """Shift, scale and gate vectors from the conditioning vector: one triple, or two for a double block."""

    def __init__(self, dim: int, *, double: bool) -> None:
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> three or six [B, 1, D]."""
        return self.lin(nn.functional.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself joins both streams and lives in the block."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v [B, H, L, E], q and k normalised."""
        return split_heads(self.qkv(x), self.num_heads, self.norm)


def split_heads(qkv: Tensor, num_heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3*D] laid out as (3, H, E) -> q, k, v [B, H, L, E], q and k normalised."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = norm(q, k, v)
    return q, k, v


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class DoubleStreamBlock(nn.Module):
    """A block in which image and text keep weights of their own and attend to each other.

    Args:
        hidden_size: D.
        num_heads: H.
        mlp_ratio: width of the MLPs in units of D.
        qkv_bias: whether queries, keys and values have a bias.
        modulations: what makes the six vectors of the image and of the text, each from what the block is given as
            `vec`; projections of a conditioning vector when None.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qkv_bias: bool,
        modulations: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        mlp = int(hidden_size * mlp_ratio)
        self.attend = attend
        if modulations is None:
            modulations = Modulation(hidden_size, double=True), Modulation(hidden_size, double=True)
        for stream, modulation in zip(("img", "txt"), modulations, strict=True):
            self.add_module(f"{stream}_mod", modulation)
            self.add_module(f"{stream}_norm1", _layer_norm(hidden_size))
            self.add_module(f"{stream}_attn", SelfAttention(hidden_size, num_heads, qkv_bias=qkv_bias))
            self.add_module(f"{stream}_norm2", _layer_norm(hidden_size))
            layers = nn.Linear(hidden_size, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden_size)
            self.add_module(f"{stream}_mlp", nn.Sequential(*layers))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rotations: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, D], txt [B, T, D], vec [B, D], rotations [B, 1, T+L, E/2, 2, 2], mask [B, 1, 1, T+L] bool."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_q, img_k, img_v = self.img_attn.heads((1 + img_scale1) * self.img_norm1(img) + img_shift1)
        txt_q, txt_k, txt_v = self.txt_attn.heads((1 + txt_scale1) * self.txt_norm1(txt) + txt_shift1)
        q, k = torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        joint = self.attend(apply_rope(q, rotations), apply_rope(k, rotations), v, mask=mask)
        txt_out, img_out = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]
        img = img + img_gate1 * self.img_attn.proj(img_out)
        img = img + img_gate2 * self.img_mlp((1 + img_scale2) * self.img_norm2(img) + img_shift2)
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_out)
        txt = txt + txt_gate2 * self.txt_mlp((1 + txt_scale2) * self.txt_norm2(txt) + txt_shift2)
        return img, txt


class SingleStreamBlock(nn.Module):
    """A block over the joined sequence, attention and MLP side by side; arguments as of `DoubleStreamBlock`."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, *, modulation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.hidden_size = hidden_size
        self.mlp_size = int(hidden_size * mlp_ratio)
        self.linear1 = nn.Linear(hidden_size, hidden_size * 3 + self.mlp_size)
        self.linear2 = nn.Linear(hidden_size + self.mlp_size, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = _layer_norm(hidden_size)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = modulation or Modulation(hidden_size, double=False)

    def forward(self, x: Tensor, vec: Tensor, rotations: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T+L, D], vec [B, D]; rotations and mask as in `DoubleStreamBlock`."""
        shift, scale, gate = self.modulation(vec)
        hidden = self.linear1((1 + scale) * self.pre_norm(x) + shift)
        qkv, mlp = torch.split(hidden, [3 * self.hidden_size, self.mlp_size], dim=-1)
        q, k, v = split_heads(qkv, self.num_heads, self.norm)
        attention = self.attend(apply_rope(q, rotations), apply_rope(k, rotations), v, mask=mask)
        return x + gate * self.linear2(torch.cat((attention, self.mlp_act(mlp)), dim=-1))


class LastLayer(nn.Module):
    """Final modulation and projection to latent patches."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, out_channels]."""
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
        return self.linear((1 + scale[:, None, :]) * self.norm_final(x) + shift[:, None, :])


class Flux(nn.Module):
    """The FLUX.1 transformer: packed latents and text in, the velocity of each patch out."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, size)
        self.time_in = MLPEmbedder(256, size)
        self.vector_in = MLPEmbedder(params.vec_in_dim, size)
        self.guidance_in = MLPEmbedder(256, size) if params.guidance_embed else nn.Identity()
        self.txt_in = nn.Linear(params.context_in_dim, size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(size, params.num_heads, params.mlp_ratio, qkv_bias=params.qkv_bias)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(size, params.num_heads, params.mlp_ratio) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(size, params.out_channels)

    def conditioning_vector(self, times: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """times [B] in [0, 1], pooled [B, vec_in_dim], guidance [B] -> [B, D]."""
        vec = self.time_in(timestep_embedding(1000.0 * times, 256).to(dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("this model was distilled with guidance and needs a guidance vector")
            vec = vec + self.guidance_in(timestep_embedding(1000.0 * guidance, 256).to(dtype))
        return vec + self.vector_in(pooled.to(dtype))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        times: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity of packed latents.

        Args:
            img: packed latents [B, L, in_channels].
            img_ids: positions (index, row, column) [B, L, 3].
            txt: text states [B, T, context_in_dim].
            txt_ids: zeros [B, T, 3].
            times: noise level in [0, 1], 1 is pure noise [B].
            pooled: pooled CLIP state [B, vec_in_dim].
            guidance: guidance strength [B]; needed by models distilled with it.
            txt_mask: True where a text token may be attended to [B, T].

        Returns:
            [B, L, out_channels].
        """
        vec = self.conditioning_vector(times, pooled, guidance, img.dtype)
        img, txt = self.img_in(img), self.txt_in(txt)
        rotations = rope_rotations(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        mask = None
        if txt_mask is not None:
            everything = torch.ones(img.shape[:2], dtype=torch.bool, device=img.device)
            mask = torch.cat((txt_mask.bool(), everything), dim=1)[:, None, None, :]
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotations, mask)
        joint = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            joint = block(joint, vec, rotations, mask)
        return self.final_layer(joint[:, txt.shape[1] :], vec)


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, (H/2)*(W/2), 4*C]: 2x2 patches, channel slowest."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents` for latents of the given height and width."""
    batch, _, channels = packed.shape
    patches = packed.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def image_ids(batch: int, height: int, width: int, device: torch.device | str) -> Tensor:
    """Positions (0, row, column) of the patches of a latent: [B, (H/2)*(W/2), 3] float32."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.reshape(1, -1, 3).expand(batch, -1, -1)
