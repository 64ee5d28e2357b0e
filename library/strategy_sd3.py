"""How Stable Diffusion 3 and 3.5 tokenize, encode, noise and predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.batch import Conditioning, StepInputs
from library.diffusion.flow import NUM_TIMESTEPS, DataFlow
from library.diffusion.from_options import data_flow_process
from library.diffusion.process import per_sample
from library.modules import vae as autoencoder
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, load_tokenizer
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.sd3_models import MMDiT, scaled_table
from library.strategy_base import (
    FlowDenoisingStrategy,
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
CLIP_G_TOKENIZER = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
T5_TOKENIZER = "google/t5-v1_1-xxl"
SCALE, SHIFT = 1.5305, 0.0609
_CLIP_LENGTH = 77
_FACTOR = 8  # image pixels per latent pixel
_NAMES = ("CLIP-L", "CLIP-G", "T5")
_PARTS = ("clip_l", "clip_g", "t5")


@dataclass(frozen=True)
class Sd3Conditioning(Conditioning):
    """What the three encoders say.

    Attributes:
        l_out: CLIP-L's states [B, 77, D1].
        g_out: CLIP-G's states [B, 77, D2].
        t5_out: T5's states [B, T, D3], D3 at least D1 + D2; zeros where there is no T5.
        l_pooled: CLIP-L's projected end of text [B, P1].
        g_pooled: CLIP-G's [B, P2].
        clip_l_attn_mask: 1 where CLIP-L has a token [B, 77] int64.
        clip_g_attn_mask: the same of CLIP-G.
        t5_attn_mask: the same of T5 [B, T].
    """

    l_out: Tensor | None
    g_out: Tensor | None
    t5_out: Tensor | None
    l_pooled: Tensor | None
    g_pooled: Tensor | None
    clip_l_attn_mask: Tensor | None
    clip_g_attn_mask: Tensor | None
    t5_attn_mask: Tensor | None


class Sd3TokenizeStrategy(TokenizeStrategy):
    """Tokens of CLIP-L, CLIP-G and T5, padded to their full length; without T5 its ids have no columns."""

    def __init__(self, tokenizers: Sequence[Any], t5_length: int) -> None:
        self.tokenizers = list(tokenizers)
        self.lengths = (_CLIP_LENGTH, _CLIP_LENGTH, t5_length)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids of the three [B, 77], [B, 77], [B, T], then their masks."""
        ids, masks = [], []
        for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True):
            if tokenizer is None:
                ids.append(torch.zeros(len(texts), 0, dtype=torch.int64))
                masks.append(ids[-1])
                continue
            found = tokenizer(
                list(texts), max_length=length, padding="max_length", truncation=True, return_tensors="pt"
            )
            ids.append(found.input_ids)
            masks.append(found.attention_mask)
        return [*ids, *masks]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        for tokenizer, encoder, name in zip(self.tokenizers, encoders, _NAMES, strict=True):
            if encoder is not None and tokenizer is not None:
                check_vocabulary(tokenizer, encoder.config.vocab_size, name=name)


class Sd3TextEncodingStrategy(TextEncodingStrategy):
    """CLIP's states before the last layer with their pooled text, and T5's states.

    Args:
        apply_lg_attn_mask: whether CLIP's padding is masked inside the encoders.
        apply_t5_attn_mask: the same of T5.
        without_t5: width of the zeros that stand for T5's states; None where the model has a T5.
    """

    def __init__(self, *, apply_lg_attn_mask: bool, apply_t5_attn_mask: bool, without_t5: int | None) -> None:
        self.masked = (apply_lg_attn_mask, apply_lg_attn_mask, apply_t5_attn_mask)
        self.without_t5 = without_t5

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> Sd3Conditioning:
        """tokens: ids of the three encoders, then masks."""
        values: dict[str, Tensor | None] = dict.fromkeys(Sd3Conditioning.__dataclass_fields__)
        for letter, place in (("l", 0), ("g", 1)):
            encoder = encoders[place]
            if encoder is None:
                continue
            mask = tokens[3 + place]
            output = self._run(encoder, tokens[place], mask, masked=self.masked[place], output_hidden_states=True)
            values[f"{letter}_out"], values[f"{letter}_pooled"] = output.hidden_states[-2], output.text_embeds
            values[f"clip_{letter}_attn_mask"] = mask
        if encoders[2] is not None:
            output = self._run(encoders[2], tokens[2], tokens[5], masked=self.masked[2])
            values["t5_out"], values["t5_attn_mask"] = output.last_hidden_state, tokens[5]
        elif self.without_t5 is not None and values["l_out"] is not None:
            batch = tokens[0].shape[0]
            values["t5_out"] = torch.zeros(batch, _CLIP_LENGTH, self.without_t5, device=values["l_out"].device)
            values["t5_attn_mask"] = torch.zeros(batch, _CLIP_LENGTH, dtype=torch.int64)
        return Sd3Conditioning(**values)

    def _run(self, encoder: nn.Module, ids: Tensor, mask: Tensor, *, masked: bool, **more: Any) -> Any:
        device = next(encoder.parameters()).device
        return encoder(ids.to(device), attention_mask=mask.to(device) if masked else None, **more)

    def trained_encoders(self, encoders: Sequence[nn.Module | None], network: nn.Module) -> list[bool]:
        """Both CLIPs; T5 only when the adapter says so."""
        present = super().trained_encoders(encoders, network)
        return [*present[:2], present[2] and bool(getattr(network, "train_t5xxl", False))]

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        stack = getattr(encoder, "text_model", encoder).encoder
        return list(stack.block if hasattr(stack, "block") else stack.layers)


class Sd3TextOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """CLIP's states of both encoders side by side, as other programs keep them.

    Args:
        clip_l_sizes: widths of CLIP-L's states and of its pooled text.
        settings: see the base class.
        flags: see the base class.
    """

    def __init__(
        self, clip_l_sizes: tuple[int, int], settings: Sequence[object], flags: Mapping[str, bool | float]
    ) -> None:
        super().__init__(Sd3Conditioning, settings, flags)
        self.clip_l_sizes = dict(zip(("out", "pooled"), clip_l_sizes, strict=True))

    def pack(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """See the base class."""
        arrays = super().pack(conditioning)
        for kind in ("out", "pooled"):
            pair = [arrays.pop(f"{letter}_{kind}", None) for letter in "lg"]
            if all(part is not None for part in pair):
                arrays[f"lg_{kind}"] = torch.cat(pair, dim=-1)
        return arrays

    def unpack(self, arrays: Mapping[str, Tensor]) -> Conditioning:
        """See the base class."""
        split = dict(arrays)
        for kind, size in self.clip_l_sizes.items():
            both = split.pop(f"lg_{kind}")
            split[f"l_{kind}"], split[f"g_{kind}"] = both[..., :size], both[..., size:]
        return super().unpack(split)


class Sd3DenoisingStrategy(FlowDenoisingStrategy):
    """Prediction of the data by way of the velocity.

    Args:
        process: how noise levels are drawn and weighted.
        dropout: shares of captions that CLIP-L, CLIP-G and T5 do not see.
        random_crop: share of steps with positions from a random place of the table.
        scaled_positions: whether each trained resolution has a table of its own.
    """

    latent_channels = 16
    spatial_factor = _FACTOR
    sample_defaults = SampleDefaults(
        steps=30, scale=7.5, multiple=16, sampler="euler", flow_shift=3.0, reads=frozenset({"flow_shift"})
    )
    gradient_inputs = frozenset({"context", "x"})

    def __init__(
        self,
        process: DataFlow,
        *,
        dropout: tuple[float, float, float] = (0.0, 0.0, 0.0),
        random_crop: float = 0.0,
        scaled_positions: bool = False,
    ) -> None:
        self.process = process
        self.dropout = dropout
        self.random_crop = random_crop
        self.scaled_positions = scaled_positions
        self.sides: tuple[int, ...] = ()

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Joint blocks."""
        return list(denoiser.joint_blocks)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """(z - 0.0609) * 1.5305."""
        return (latents - SHIFT) * SCALE

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / SCALE + SHIFT)

    def draw(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Which encoders an image's caption is kept from (1), and where its positions begin (shares, or -1)."""
        found = {}
        for name, rate in zip(_PARTS, self.dropout, strict=True):
            if rate > 0:
                found[name] = torch.cat([(torch.rand(1, generator=one) < rate).float() for one in generators])
        if self.random_crop > 0:
            rows = []
            for one in generators:
                corner = torch.rand(2, generator=one)
                rows.append(corner if torch.rand(1, generator=one) < self.random_crop else torch.full((2,), -1.0))
            found["positions"] = torch.stack(rows)
        return found

    def expect_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Sides of the tables of `--enable_scaled_pos_embed`: tokens along a square image of each resolution."""
        patches = {round((width * height) ** 0.5) // _FACTOR // 2 for width, height in sizes}
        self.sides = tuple(sorted(patches))

    def positions(self, denoiser: MMDiT, rows: int, columns: int, draws: Mapping[str, Tensor]) -> Tensor | None:
        """Position vectors of the image tokens [B or 1, L, D]; None for the middle of the model's own table."""
        table = self._table(denoiser, rows, columns) if self.scaled_positions and self.sides else None
        corners = draws.get("positions")
        if corners is None:
            return None if table is None else denoiser.positions(rows, columns, table=table)
        chosen = denoiser.positions(rows, columns, corners.clamp(min=0), table=table)
        middle = denoiser.positions(rows, columns, table=table)
        return torch.where((corners[:, :1] >= 0)[:, None], chosen, middle)

    def _table(self, denoiser: MMDiT, rows: int, columns: int) -> Tensor:
        """The table of the trained resolution that is nearest in area, larger where a side does not fit."""
        tokens = rows * columns
        limits = [(low**2 + high**2) // 2 for low, high in zip(self.sides, self.sides[1:])]
        side = self.sides[sum(tokens > limit for limit in limits)]
        grid = max(int(1.5 * side), rows, columns)
        return scaled_table(denoiser.params.hidden_size, side, grid)

    def velocity(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        draws: Mapping[str, Tensor],
    ) -> Tensor:
        """The model's output for noisy latents [B, C, H, W] at timesteps [B], as [B, C, H, W]."""
        dtype = next(denoiser.parameters()).dtype
        context, pooled = joined(conditioning, draws)
        patch = denoiser.params.patch_size
        return denoiser(
            noisy.to(dtype),
            timesteps,
            context.to(dtype),
            pooled.to(dtype),
            self.positions(denoiser, noisy.shape[2] // patch, noisy.shape[3] // patch, draws),
        )

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The data that the velocity leads to: noisy - sigma * velocity."""
        velocity = self.velocity(denoiser, inputs.noisy, inputs.timesteps, conditioning, inputs.draws)
        return inputs.noisy - per_sample(inputs.timesteps / NUM_TIMESTEPS, velocity) * velocity

    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """See the base class."""
        del request
        return self.velocity(denoiser, latents, sigmas * NUM_TIMESTEPS, conditioning, {})


def joined(conditioning: Conditioning, draws: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the transformer reads: text states [B, 77 + T, D3] and pooled text [B, P1 + P2].

    Args:
        conditioning: of the encoders.
        draws: 1 where an image's caption is kept from `clip_l`, `clip_g` or `t5` [B].
    """
    kept = {name: 1 - draws[name] for name in _PARTS if name in draws}

    def seen(values: Tensor, name: str) -> Tensor:
        return values * per_sample(kept[name].to(values), values) if name in kept else values

    t5 = seen(conditioning.t5_out, "t5")
    clip = torch.cat((seen(conditioning.l_out, "clip_l"), seen(conditioning.g_out, "clip_g")), dim=-1).to(t5)
    clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    pooled = torch.cat((seen(conditioning.l_pooled, "clip_l"), seen(conditioning.g_pooled, "clip_g")), dim=-1)
    return torch.cat((clip, t5), dim=1), pooled


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    cache_dir = options.value("tokenizer_cache_dir")
    model = options.value("pretrained_model_name_or_path")

    def beside(flag: str, folder: str) -> tuple[Path, ...]:
        return (Path(options.value(flag) or model).parent / folder,)

    common = {"cache_dir": cache_dir}
    clip_l = load_tokenizer("CLIPTokenizer", CLIP_TOKENIZER, beside=beside("clip_l", "tokenizer"), **common)
    clip_g = load_tokenizer(
        "CLIPTokenizer", CLIP_G_TOKENIZER, beside=beside("clip_g", "tokenizer_2"), pad_id=0, **common
    )
    has_t5 = variant.config["has_t5"]
    t5 = (
        load_tokenizer("T5Tokenizer", T5_TOKENIZER, beside=beside("t5xxl", "tokenizer_3"), **common) if has_t5 else None
    )
    masks = {name: options.value(name) for name in ("apply_lg_attn_mask", "apply_t5_attn_mask")}
    length = options.value("t5xxl_max_token_length")
    rates = tuple(options.value(f"{name}_dropout_rate") for name in _PARTS)
    return Strategies(
        tokenize=Sd3TokenizeStrategy((clip_l, clip_g, t5), length),
        text_encoding=Sd3TextEncodingStrategy(
            **masks, without_t5=None if has_t5 else variant.config["params"].context_size
        ),
        latents_caching=autoencoder.AutoencoderLatents(),
        text_outputs_caching=Sd3TextOutputsCachingStrategy(
            variant.config["clip_l_sizes"], (length, *masks.values()), masks
        ),
        denoising=Sd3DenoisingStrategy(
            data_flow_process(options, options.value("training_shift")),
            dropout=rates,
            random_crop=options.value("pos_emb_random_crop_rate"),
            scaled_positions=options.value("enable_scaled_pos_embed"),
        ),
        conditioning=Sd3Conditioning,
    )
