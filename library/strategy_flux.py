"""How FLUX.1 and Chroma tokenize, encode, noise and predict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.batch import Conditioning, StepInputs
from library.diffusion.flow import NUM_TIMESTEPS, RectifiedFlow, resolution_shift, shifted, time_shifted
from library.diffusion.from_options import flow_process
from library.diffusion.process import per_sample
from library.flux_models import image_ids, pack_latents, unpack_latents
from library.modules import vae as autoencoder
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, load_tokenizer
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.strategy_base import (
    FlowDenoisingStrategy,
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
T5_TOKENIZER = "google/t5-v1_1-xxl"
SCALE = 0.3611
SHIFT = 0.1159
_T5_LENGTH = {"dev": 512, "schnell": 256, "chroma": 512}
_CHROMA_SCALE = 4.0  # classifier-free guidance of its samples: the model was not distilled with guidance


@dataclass(frozen=True)
class FluxConditioning(Conditioning):
    """`l_pooled` [B, P], `t5_out` [B, T, D], `t5_attn_mask` [B, T] int64 (1 = a real token)."""

    l_pooled: Tensor | None
    t5_out: Tensor | None
    t5_attn_mask: Tensor | None


class FluxTokenizeStrategy(TokenizeStrategy):
    """CLIP-L and T5 tokens, padded to their full length; without a CLIP tokenizer its ids have no columns."""

    def __init__(self, clip: Any, t5: Any, t5_length: int) -> None:
        self.clip = clip
        self.t5 = t5
        self.t5_length = t5_length

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """CLIP ids [B, 77], T5 ids [B, T], T5 mask [B, T]."""
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        empty = torch.zeros(len(texts), 0, dtype=torch.int64)
        clip = empty if self.clip is None else self.clip(list(texts), max_length=77, **padded).input_ids
        t5 = self.t5(list(texts), max_length=self.t5_length, **padded)
        return [clip, t5.input_ids, t5.attention_mask]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        for tokenizer, encoder, name in zip((self.clip, self.t5), encoders, ("CLIP", "T5"), strict=False):
            if encoder is not None:
                check_vocabulary(tokenizer, encoder.config.vocab_size, name=name)


class FluxTextEncodingStrategy(TextEncodingStrategy):
    """CLIP-L's pooled state and T5's sequence."""

    def __init__(self, *, apply_t5_attn_mask: bool) -> None:
        self.apply_t5_attn_mask = apply_t5_attn_mask

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> FluxConditioning:
        """tokens: CLIP ids, T5 ids, T5 mask."""
        clip, t5 = encoders
        clip_ids, t5_ids, mask = tokens
        pooled = sequence = None
        if clip is not None:
            pooled = clip(clip_ids.to(_device(clip))).pooler_output
        if t5 is not None:
            seen = mask.to(_device(t5)) if self.apply_t5_attn_mask else None
            sequence = t5(t5_ids.to(_device(t5)), attention_mask=seen).last_hidden_state
        return FluxConditioning(l_pooled=pooled, t5_out=sequence, t5_attn_mask=mask if t5 is not None else None)

    def trained_encoders(self, encoders: Sequence[nn.Module | None], network: nn.Module) -> list[bool]:
        """CLIP-L always; T5 only when the adapter says so."""
        present = super().trained_encoders(encoders, network)
        return [present[0], present[1] and bool(getattr(network, "train_t5xxl", False))]

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        stack = encoder.encoder
        return list(stack.block if hasattr(stack, "block") else stack.layers)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class FluxTextOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Besides the fields: position ids of the text, which are all zero."""

    def pack(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """See the base class. Without CLIP the pooled state is a table of zeros, as other programs write it."""
        arrays = {"l_pooled": torch.zeros(77, 1), **super().pack(conditioning)}
        return {**arrays, "txt_ids": torch.zeros(arrays["t5_out"].shape[0], 3)}


class FluxDenoisingStrategy(FlowDenoisingStrategy):
    """Velocity prediction on packed latents.

    Args:
        process: how noise levels are drawn and weighted.
        guidance: value of the guidance vector given to models distilled with guidance.
        prediction_type: `raw` compares the output itself; `additive` output + noisy; `sigma_scaled`
            noisy - sigma * output.
        apply_t5_attn_mask: whether padding tokens of the text are masked in attention.
        variant: dev reads the guidance vector; schnell does not; Chroma always gets the one of its training.
    """

    latent_channels = 16
    spatial_factor = 8
    sample_defaults = SampleDefaults(
        steps=20,
        scale=1.0,
        guidance=3.5,
        multiple=16,
        sampler="euler",
        reads=frozenset({"guidance_scale", "flow_shift"}),
    )
    gradient_inputs = frozenset({"img", "txt", "x"})

    def __init__(
        self,
        process: RectifiedFlow,
        *,
        guidance: float,
        prediction_type: str,
        apply_t5_attn_mask: bool,
        variant: str = "dev",
    ) -> None:
        self.process = process
        self.guidance = guidance
        self.prediction_type = prediction_type
        self.apply_t5_attn_mask = apply_t5_attn_mask
        if variant != "dev":
            defaults = FluxDenoisingStrategy.sample_defaults
            scale = _CHROMA_SCALE if variant == "chroma" else defaults.scale
            reads = defaults.reads - {"guidance_scale"}
            self.sample_defaults = replace(defaults, guidance=None, scale=scale, reads=reads)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Double blocks, then single blocks."""
        return [*denoiser.double_blocks, *denoiser.single_blocks]

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Cached latents are normalised already."""
        return latents

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / SCALE + SHIFT)

    def velocity(
        self, denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        """The model's output for noisy latents [B, C, H, W] at sigmas [B], as [B, C, H, W]."""
        batch, _, height, width = noisy.shape
        dtype = next(denoiser.parameters()).dtype
        text = conditioning.t5_out.to(dtype)
        packed = denoiser(
            pack_latents(noisy).to(dtype),
            image_ids(batch, height, width, noisy.device),
            text,
            torch.zeros(batch, text.shape[1], 3, device=noisy.device),
            sigmas,
            None if conditioning.l_pooled is None else conditioning.l_pooled.to(dtype),
            guidance=torch.full((batch,), guidance, device=noisy.device),
            txt_mask=conditioning.t5_attn_mask if self.apply_t5_attn_mask else None,
        )
        return unpack_latents(packed, height, width)

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The velocity, or what `prediction_type` makes of it."""
        output = self.velocity(denoiser, inputs.noisy, inputs.timesteps / NUM_TIMESTEPS, conditioning, self.guidance)
        if self.prediction_type == "additive":
            return output + inputs.noisy
        if self.prediction_type == "sigma_scaled":
            return inputs.noisy - per_sample(inputs.sigmas, output) * output
        return output

    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """See the base class."""
        guidance = self.guidance if request.guidance is None else request.guidance
        return self.velocity(denoiser, latents, sigmas, conditioning, guidance)

    def sample_levels(self, request: SampleRequest, noise: Tensor) -> Tensor:
        """Shifted for the image's size, or by the request's `flow_shift`."""
        tokens = (noise.shape[2] // 2) * (noise.shape[3] // 2)
        return sampling_sigmas(request.steps, tokens, request.flow_shift)


def sampling_sigmas(steps: int, num_tokens: int, shift: float | None = None) -> Tensor:
    """Noise levels from 1 to 0 [steps + 1], shifted by `shift`, or as the number of image tokens asks for."""
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if shift is not None:
        return shifted(levels, shift).float()
    return time_shifted(levels, resolution_shift(num_tokens)).float()


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    masked = options.value("apply_t5_attn_mask")
    cache_dir = options.value("tokenizer_cache_dir")
    clip = None
    if variant.name != "chroma":
        beside = Path(options.value("clip_l")).parent / "tokenizer"
        clip = load_tokenizer("CLIPTokenizer", CLIP_TOKENIZER, cache_dir=cache_dir, beside=(beside,))
    beside = Path(options.value("t5xxl")).parent / "tokenizer_2"
    t5 = load_tokenizer("T5Tokenizer", T5_TOKENIZER, cache_dir=cache_dir, beside=(beside,))
    length = options.value("t5xxl_max_token_length") or _T5_LENGTH[variant.name]
    return Strategies(
        tokenize=FluxTokenizeStrategy(clip, t5, length),
        text_encoding=FluxTextEncodingStrategy(apply_t5_attn_mask=masked),
        latents_caching=autoencoder.AutoencoderLatents(SHIFT, SCALE),
        text_outputs_caching=FluxTextOutputsCachingStrategy(
            FluxConditioning, (length, masked), {"apply_t5_attn_mask": masked}
        ),
        denoising=FluxDenoisingStrategy(
            flow_process(options, weighted=options.value("model_prediction_type") == "sigma_scaled"),
            guidance=options.value("guidance_scale"),
            prediction_type=options.value("model_prediction_type"),
            apply_t5_attn_mask=masked,
            variant=variant.name,
        ),
        conditioning=FluxConditioning,
    )
