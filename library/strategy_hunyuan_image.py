"""How HunyuanImage 2.1 tokenizes, encodes, noises and predicts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.batch import Conditioning, StepInputs
from library.diffusion.flow import NUM_TIMESTEPS, RectifiedFlow
from library.diffusion.from_options import flow_process
from library.diffusion.process import per_sample
from library.hunyuan_image_vae import SCALE
from library.modules import vae as autoencoder
from library.modules.components import Variant
from library.modules.tokenizers import LocalTokenizer, check_vocabulary, load_tokenizer
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.strategy_base import (
    FlowDenoisingStrategy,
    Guidance,
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    guided,
)

TOKENIZER = "Qwen/Qwen2.5-VL-7B-Instruct"
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
)
_TEMPLATE_TOKENS = 34  # of the published tokenizer before the caption; never shown to the transformer
_MOST_TOKENS = 1024
_GLYPH_TOKENS = 128
_QUOTES = (r'"(.*?)"', "\u2018(.*?)\u2019", "\u201c(.*?)\u201d")  # straight, curved single, curved double
_PUBLISHED_STEPS = 50


@dataclass(frozen=True)
class HunyuanImageConditioning(Conditioning):
    """What a caption and the text that it quotes say.

    Attributes:
        vlm_embed: states of the caption [B, L, D], zeros where `vlm_mask` is 0.
        vlm_mask: 1 where there is a token [B, L] int64.
        byt5_embed: states of quoted text [B, 128, E], zeros where `byt5_mask` is 0.
        byt5_mask: 1 where there is a token [B, 128] int64.
        ocr_mask: whether the caption quotes text [B] bool.
    """

    vlm_embed: Tensor | None
    vlm_mask: Tensor | None
    byt5_embed: Tensor | None
    byt5_mask: Tensor | None
    ocr_mask: Tensor | None

    @classmethod
    def collate(cls, items: list[Self]) -> Self:
        """Join samples; shorter captions get zeros at their end."""
        longest = max((item.vlm_mask.shape[1] for item in items if item.vlm_mask is not None), default=0)
        return super().collate([item._padded(longest) for item in items])

    def _padded(self, length: int) -> "HunyuanImageConditioning":
        if self.vlm_mask is None or self.vlm_embed is None:
            return self
        rest = length - self.vlm_mask.shape[1]
        embed, mask = functional.pad(self.vlm_embed, (0, 0, 0, rest)), functional.pad(self.vlm_mask, (0, rest))
        return replace(self, vlm_embed=embed, vlm_mask=mask)


def quoted(caption: str) -> list[str]:
    """Text between straight double quotes, then between single and double curved ones."""
    return [found for pattern in _QUOTES for found in re.findall(pattern, caption)]


class ByteTokenizer(LocalTokenizer):
    """byT5's tokenizer: bytes, so it needs no files."""

    def __init__(self) -> None:
        super().__init__("ByT5Tokenizer", Path())

    @cached_property
    def loaded(self) -> Any:
        """The tokenizer itself."""
        import transformers

        return transformers.ByT5Tokenizer()


class HunyuanImageTokenizeStrategy(TokenizeStrategy):
    """Tokens of the caption in its template, and bytes of the text that it quotes."""

    def __init__(self, vlm: Any, byt5: Any) -> None:
        self.vlm = vlm
        self.byt5 = byt5

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids and mask of captions [B, 34 + L], ids and mask of quoted text [B, 128], whether there is any [B]."""
        vlm = self.vlm(
            [_TEMPLATE.format(text) for text in texts],
            max_length=_MOST_TOKENS + _TEMPLATE_TOKENS,
            padding="longest",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        quotes = [quoted(text) for text in texts]
        byt5 = self.byt5(
            ["".join(f'Text "{part}". ' for part in parts) for parts in quotes],
            max_length=_GLYPH_TOKENS,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        found = torch.tensor([bool(parts) for parts in quotes])
        return [vlm.input_ids, vlm.attention_mask, byt5.input_ids, byt5.attention_mask * found[:, None], found]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        for tokenizer, encoder, name in zip((self.vlm, self.byt5), encoders, ("Qwen2.5-VL", "byT5"), strict=True):
            if encoder is not None:
                check_vocabulary(tokenizer, encoder.config.vocab_size, name=name)


class HunyuanImageTextEncodingStrategy(TextEncodingStrategy):
    """Qwen2.5-VL's states before its last two layers without the template, and byT5's states."""

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> HunyuanImageConditioning:
        """tokens: as `HunyuanImageTokenizeStrategy.tokenize` gives them."""
        vlm_ids, vlm_mask, byt5_ids, byt5_mask, found = tokens
        vlm, byt5 = encoders
        values: dict[str, Tensor | None] = dict.fromkeys(f.name for f in fields(HunyuanImageConditioning))
        if vlm is not None:
            device = next(vlm.parameters()).device
            output = vlm(vlm_ids.to(device), attention_mask=vlm_mask.to(device), output_hidden_states=True)
            mask = vlm_mask[:, _TEMPLATE_TOKENS:]
            states = output.hidden_states[-3][:, _TEMPLATE_TOKENS:]
            values["vlm_embed"], values["vlm_mask"] = states * mask[..., None].to(states), mask
        if byt5 is not None:
            device = next(byt5.parameters()).device
            mask = byt5_mask.to(device)
            # a caption that quotes nothing has no token to attend to; its states are zeros whatever comes out
            seen = torch.where(found.to(device)[:, None], mask, 1)
            states = byt5(byt5_ids.to(device), attention_mask=seen.float()).last_hidden_state
            values["byt5_embed"] = states * mask[..., None].to(states)
            values["byt5_mask"], values["ocr_mask"] = byt5_mask, found
        return HunyuanImageConditioning(**values)

    def trained_encoders(self, encoders: Sequence[nn.Module | None], network: nn.Module) -> list[bool]:
        """None: adapters change the transformer only."""
        del network
        return [False] * len(encoders)

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.encoder.block)


class ProjectedGuidance:
    """Adaptive projected guidance: Sadat et al., "Eliminating Oversaturation" (2024).

    Args:
        scale: strength of what is left of the difference.
        momentum: share of earlier differences.
        limit: largest norm of the difference.
    """

    def __init__(self, scale: float = 10.0, momentum: float = -0.5, limit: float = 10.0) -> None:
        self.scale = scale
        self.momentum = momentum
        self.limit = limit
        self.average: Tensor | float = 0.0

    def step(self, wanted: Tensor, unwanted: Tensor) -> Tensor:
        """A guided prediction [B, C, H, W]; the difference is remembered for the next step."""
        axes = list(range(1, wanted.ndim))
        self.average = (wanted - unwanted) + self.momentum * self.average
        norm = torch.linalg.vector_norm(self.average, dim=axes, keepdim=True)
        difference = self.average * (self.limit / norm.clamp(min=1e-12)).clamp(max=1.0)
        direction = functional.normalize(wanted.double().flatten(1), dim=1).view(wanted.shape)
        along = (difference.double() * direction).sum(dim=axes, keepdim=True) * direction
        return unwanted + self.scale * (difference - along.to(difference))


class HunyuanImageDenoisingStrategy(FlowDenoisingStrategy):
    """Velocity prediction at whole noise levels.

    Args:
        process: how noise levels are drawn and weighted.
        prediction_type: `raw` compares the output itself; `additive` output + noisy; `sigma_scaled`
            noisy - sigma * output.
    """

    latent_channels = 64
    spatial_factor = 32
    sample_defaults = SampleDefaults(
        steps=20, scale=3.5, multiple=32, sampler="euler", flow_shift=5.0, reads=frozenset({"flow_shift"})
    )
    gradient_inputs = frozenset({"img", "txt", "x"})
    # of fifty steps, the last with classifier-free guidance: where the prompt quotes text, and elsewhere
    plain_steps = (38, 5)
    rescale, projected_rescale = 0.0, 0.0

    def __init__(self, process: RectifiedFlow, *, prediction_type: str = "raw") -> None:
        self.process = process
        self.prediction_type = prediction_type

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Double blocks, then single blocks."""
        return [*denoiser.double_blocks, *denoiser.single_blocks]

    def scale_latents(self, latents: Tensor) -> Tensor:
        """z * 0.75289."""
        return latents * SCALE

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / SCALE)

    def velocity(self, denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's output for noisy latents [B, C, H, W] at sigmas [B], as [B, C, H, W]."""
        dtype = next(denoiser.parameters()).dtype
        return denoiser(
            noisy.to(dtype),
            (sigmas * NUM_TIMESTEPS).floor(),
            conditioning.vlm_embed.to(dtype),
            conditioning.vlm_mask,
            conditioning.byt5_embed.to(dtype),
            conditioning.byt5_mask,
        )

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The velocity, or what `prediction_type` makes of it."""
        sigmas = inputs.timesteps / NUM_TIMESTEPS if inputs.sigmas is None else inputs.sigmas
        output = self.velocity(denoiser, inputs.noisy, sigmas, conditioning)
        if self.prediction_type == "additive":
            return output + inputs.noisy
        if self.prediction_type == "sigma_scaled":
            return inputs.noisy - per_sample(sigmas, output) * output
        return output

    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """See the base class."""
        del request
        return self.velocity(denoiser, latents, sigmas, conditioning)

    def guide(self, request: SampleRequest, positive: Conditioning) -> Guidance:
        """Classifier-free guidance at first, then adaptive projected guidance.

        Where the change happens is published for fifty steps; with others it is at the same share of them.
        """
        quotes = bool(positive.ocr_mask.any())
        plain = self.plain_steps[0 if quotes else 1] * request.steps / _PUBLISHED_STEPS
        projected, steps = ProjectedGuidance(), count()

        def join(wanted: Tensor, unwanted: Tensor) -> Tensor:
            later = projected.step(wanted, unwanted)
            if next(steps) <= plain:
                return _rescaled(guided(wanted, unwanted, request.scale), wanted, self.rescale)
            return _rescaled(later, wanted, self.projected_rescale)

        return join


def _rescaled(guided_prediction: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Bring the spread of a guided prediction back to the unguided one's (Lin et al., 2023, section 3.4)."""
    if share == 0:
        return guided_prediction
    axes = list(range(1, wanted.ndim))
    factor = wanted.std(dim=axes, keepdim=True) / guided_prediction.std(dim=axes, keepdim=True)
    return guided_prediction * (share * factor + (1 - share))


def set_guidance(denoising: HunyuanImageDenoisingStrategy, options: OptionSet) -> None:
    """Take over what only the script that makes images says of guidance."""
    denoising.plain_steps = options.value("apg_start_step_ocr"), options.value("apg_start_step_general")
    denoising.rescale = options.value("guidance_rescale")
    denoising.projected_rescale = options.value("guidance_rescale_apg")


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    del variant
    cache_dir = options.value("tokenizer_cache_dir")
    beside = Path(options.value("text_encoder")).parent / "tokenizer"
    vlm = load_tokenizer("Qwen2Tokenizer", TOKENIZER, cache_dir=cache_dir, beside=(beside,))
    prediction = options.value("model_prediction_type")
    return Strategies(
        tokenize=HunyuanImageTokenizeStrategy(vlm, ByteTokenizer()),
        text_encoding=HunyuanImageTextEncodingStrategy(),
        latents_caching=autoencoder.AutoencoderLatents(),
        text_outputs_caching=TextEncoderOutputsCachingStrategy(HunyuanImageConditioning, (), {}),
        denoising=HunyuanImageDenoisingStrategy(
            flow_process(options, weighted=prediction == "sigma_scaled"), prediction_type=prediction
        ),
        conditioning=HunyuanImageConditioning,
    )
