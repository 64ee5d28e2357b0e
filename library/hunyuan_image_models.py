"""The HunyuanImage 2.1 transformer in the layout of its published checkpoint.

Attribute paths and class names are part of the file format: adapter keys and checkpoints use them.
Shapes: B batch, L image tokens, T text tokens, D hidden size, H heads, E head size (D = H * E).
Architecture: the published model description of HunyuanImage 2.1; checked against diffusers'
HunyuanImageTransformer2DModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.modules.attention import attend
from library.modules.embeddings import timestep_embedding
from library.modules.norms import WeightedRMSNorm
from library.modules.rope import apply_rope, rope_rotations

_TIME_WIDTH = 256


@dataclass(frozen=True)
class HunyuanImageParams:
    """Sizes of a HunyuanImage transformer.

    Attributes:
        in_channels: of the latents.
        out_channels: of the prediction.
        hidden_size: D.
        num_heads: H.
        mlp_size: width of the blocks' MLPs.
        depth: double blocks.
        single_depth: single blocks.
        refiner_depth: blocks of the text refiner.
        text_size: width of the captions' states.
        glyph_size: width of the states of quoted text.
        glyph_hidden: hidden width of what projects them.
        axes_dim: rotary channels of row and column.
    """

    in_channels: int
    out_channels: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    depth: int
    single_depth: int
    refiner_depth: int
    text_size: int
    glyph_size: int
    glyph_hidden: tuple[int, int]
    axes_dim: tuple[int, int]
    theta: float = 256.0


def _layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, D] -> [B, H, L, E]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class PatchEmbed2D(nn.Module):
    """Latents to tokens, row by row."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, h*w, D]."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of a noise level through linear, SiLU, linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] in 0..1000 -> [B, D]."""
        return self.mlp(timestep_embedding(timesteps, _TIME_WIDTH).to(dtype))


class TextProjection(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.act_1 = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_size] -> [B, D]."""
        return self.linear_2(self.act_1(self.linear_1(x)))


class ByT5Mapper(nn.Module):
    """States of quoted text to tokens of the transformer."""

    def __init__(self, in_size: int, hidden: tuple[int, int], out_size: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_size, eps=1e-5)
        self.fc1 = nn.Linear(in_size, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], out_size)
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in_size] -> [B, T, D]."""
        x = self.act_fn(self.fc1(self.layernorm(x)))
        return self.fc3(self.act_fn(self.fc2(x)))


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, size: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.act = activation
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.fc2(self.act(self.fc1(x)))


class IndividualTokenRefinerBlock(nn.Module):
    """A block in which the caption's tokens attend to each other."""

    def __init__(self, size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.norm1 = nn.LayerNorm(size, eps=1e-6)
        self.self_attn_qkv = nn.Linear(size, 3 * size)
        self.self_attn_proj = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size, eps=1e-6)
        self.mlp = MLP(size, mlp_size, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, vec: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], vec [B, D], mask [B, 1, 1, T] bool."""
        gate, mlp_gate = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        q, k, v = (_heads(one, self.num_heads) for one in self.self_attn_qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + gate * self.self_attn_proj(self.attend(q, k, v, mask=mask))
        return x + mlp_gate * self.mlp(self.norm2(x))


class IndividualTokenRefiner(nn.Module):
    """The blocks of the text refiner."""

    def __init__(self, params: HunyuanImageParams) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            IndividualTokenRefinerBlock(params.hidden_size, params.num_heads, params.mlp_size)
            for _ in range(params.refiner_depth)
        )

    def forward(self, x: Tensor, vec: Tensor, mask: Tensor) -> Tensor:
        """As of a block."""
        for block in self.blocks:
            x = block(x, vec, mask)
        return x


class SingleTokenRefiner(nn.Module):
    """States of a caption to tokens of the transformer, knowing the noise level."""

    def __init__(self, params: HunyuanImageParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.input_embedder = nn.Linear(params.text_size, size)
        self.t_embedder = TimestepEmbedder(size)
        self.c_embedder = TextProjection(params.text_size, size)
        self.individual_token_refiner = IndividualTokenRefiner(params)

    def forward(self, text: Tensor, mask: Tensor, timesteps: Tensor) -> Tensor:
        """text [B, T, text_size], mask [B, T] bool, timesteps [B] -> [B, T, D]."""
        share = mask[..., None].float()
        mean = (text.float() * share).sum(dim=1) / share.sum(dim=1).clamp(min=1)
        vec = self.t_embedder(timesteps, text.dtype) + self.c_embedder(mean.to(text.dtype))
        return self.individual_token_refiner(self.input_embedder(text), vec, mask[:, None, None])


class ModulateDiT(nn.Module):
    """Shift, scale and gate vectors from the conditioning vector."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(size, count * size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> `count` times [B, 1, D]."""
        return self.linear(nn.functional.silu(vec))[:, None].chunk(self.count, dim=-1)


class MMDoubleStreamBlock(nn.Module):
    """A block in which image and text keep weights of their own and attend to each other."""

    def __init__(self, params: HunyuanImageParams) -> None:
        super().__init__()
        size, heads = params.hidden_size, params.num_heads
        self.num_heads = heads
        self.attend = attend
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", ModulateDiT(size, 6))
            self.add_module(f"{stream}_norm1", _layer_norm(size))
            self.add_module(f"{stream}_attn_qkv", nn.Linear(size, 3 * size))
            self.add_module(f"{stream}_attn_q_norm", WeightedRMSNorm(size // heads))
            self.add_module(f"{stream}_attn_k_norm", WeightedRMSNorm(size // heads))
            self.add_module(f"{stream}_attn_proj", nn.Linear(size, size))
            self.add_module(f"{stream}_norm2", _layer_norm(size))
            self.add_module(f"{stream}_mlp", MLP(size, params.mlp_size, nn.GELU(approximate="tanh")))

    def _projected(self, stream: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v [B, H, L, E], q and k normalised."""
        fused = getattr(self, f"{stream}_attn_qkv")(x)
        q, k, v = (_heads(one, self.num_heads) for one in fused.chunk(3, dim=-1))
        return getattr(self, f"{stream}_attn_q_norm")(q), getattr(self, f"{stream}_attn_k_norm")(k), v

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rotations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """img [B, L, D], txt [B, T, D], vec [B, D], rotations [1, 1, L, E/2, 2, 2], mask [B, 1, 1, L+T] bool."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        q, k, v = self._projected("img", (1 + img_scale1) * self.img_norm1(img) + img_shift1)
        txt_q, txt_k, txt_v = self._projected("txt", (1 + txt_scale1) * self.txt_norm1(txt) + txt_shift1)
        q = torch.cat((apply_rope(q, rotations), txt_q), dim=2)
        k = torch.cat((apply_rope(k, rotations), txt_k), dim=2)
        joint = self.attend(q, k, torch.cat((v, txt_v), dim=2), mask=mask)
        length = img.shape[1]
        img = img + img_gate1 * self.img_attn_proj(joint[:, :length])
        img = img + img_gate2 * self.img_mlp((1 + img_scale2) * self.img_norm2(img) + img_shift2)
        txt = txt + txt_gate1 * self.txt_attn_proj(joint[:, length:])
        txt = txt + txt_gate2 * self.txt_mlp((1 + txt_scale2) * self.txt_norm2(txt) + txt_shift2)
        return img, txt


class MMSingleStreamBlock(nn.Module):
    """A block over the joined sequence, attention and MLP side by side."""

    def __init__(self, params: HunyuanImageParams) -> None:
        super().__init__()
        size = params.hidden_size
        self.num_heads, self.sizes = params.num_heads, (size, size, size, params.mlp_size)
        self.attend = attend
        self.linear1 = nn.Linear(size, 3 * size + params.mlp_size)
        self.linear2 = nn.Linear(size + params.mlp_size, size)
        self.q_norm = WeightedRMSNorm(size // params.num_heads)
        self.k_norm = WeightedRMSNorm(size // params.num_heads)
        self.pre_norm = _layer_norm(size)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = ModulateDiT(size, 3)

    def forward(self, x: Tensor, vec: Tensor, rotations: Tensor, mask: Tensor) -> Tensor:
        """x [B, L+T, D], the image first; the others as of a double block."""
        shift, scale, gate = self.modulation(vec)
        q, k, v, mlp = self.linear1((1 + scale) * self.pre_norm(x) + shift).split(self.sizes, dim=-1)
        q, k, v = (_heads(one, self.num_heads) for one in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        length = rotations.shape[2]
        q = torch.cat((apply_rope(q[:, :, :length], rotations), q[:, :, length:]), dim=2)
        k = torch.cat((apply_rope(k[:, :, :length], rotations), k[:, :, length:]), dim=2)
        attention = self.attend(q, k, v, mask=mask)
        return x + gate * self.linear2(torch.cat((attention, self.mlp_act(mlp)), dim=-1))


class FinalLayer(nn.Module):
    """Final modulation and projection to latents."""

    def __init__(self, size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(size)
        self.linear = nn.Linear(size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, out_channels]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm_final(x) + shift)


class HunyuanImage(nn.Module):
    """The HunyuanImage transformer: latents and text in, the velocity out."""

    def __init__(self, params: HunyuanImageParams) -> None:
        super().__init__()
        self.params = params
        size = params.hidden_size
        self.byt5_in = ByT5Mapper(params.glyph_size, params.glyph_hidden, size)
        self.img_in = PatchEmbed2D(params.in_channels, size)
        self.txt_in = SingleTokenRefiner(params)
        self.time_in = TimestepEmbedder(size)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(params) for _ in range(params.single_depth))
        self.final_layer = FinalLayer(size, params.out_channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        glyphs: Tensor,
        glyph_mask: Tensor,
    ) -> Tensor:
        """Velocity of noisy latents.

        Text tokens have no positions, so where padding lies among them makes no difference.

        Args:
            latents: [B, C, h, w].
            timesteps: whole noise levels in 0..1000 [B] float32.
            text: states of the captions [B, T1, text_size].
            text_mask: true where they are real [B, T1].
            glyphs: states of quoted text [B, T2, glyph_size].
            glyph_mask: true where they are real [B, T2].

        Returns:
            [B, out_channels, h, w].
        """
        batch, _, height, width = latents.shape
        device = latents.device
        vec = self.time_in(timesteps, latents.dtype)
        img = self.img_in(latents)
        txt = torch.cat((self.byt5_in(glyphs), self.txt_in(text, text_mask.bool(), timesteps)), dim=1)
        everything = torch.ones(batch, img.shape[1], dtype=torch.bool, device=device)
        mask = torch.cat((everything, glyph_mask.bool(), text_mask.bool()), dim=1)[:, None, None]
        places = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        rotations = rope_rotations(places[None], self.params.axes_dim, self.params.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotations, mask)
        joint = torch.cat((img, txt), dim=1)
        for block in self.single_blocks:
            joint = block(joint, vec, rotations, mask)
        out = self.final_layer(joint[:, : img.shape[1]], vec)
        return out.transpose(1, 2).unflatten(2, (height, width))
