"""How Anima tokenizes, encodes, noises and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.base.logs import logger
from library.batch import Conditioning, StepInputs
from library.diffusion.flow import NUM_TIMESTEPS, RectifiedFlow
from library.diffusion.from_options import flow_process
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, find_tokenizer, load_tokenizer
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.strategy_base import (
    FlowDenoisingStrategy,
    LatentsCachingStrategy,
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

QWEN3_TOKENIZER = "Qwen/Qwen3-0.6B"
T5_TOKENIZER = "google/t5-v1_1-xxl"
SAMPLE_SHIFT = 3.0
_PUBLISHED_T5_LENGTH = 512


@dataclass(frozen=True)
class AnimaConditioning(Conditioning):
    """`prompt_embeds` [B, S, D], zero at padding; `attn_mask` [B, S]; `t5_input_ids`, `t5_attn_mask` [B, T]."""

    prompt_embeds: Tensor | None
    attn_mask: Tensor | None
    t5_input_ids: Tensor | None
    t5_attn_mask: Tensor | None


class AnimaTokenizeStrategy(TokenizeStrategy):
    """Qwen3 and T5 tokens of the plain text, padded on the right to their full lengths.

    Args:
        qwen3: tokenizer of the text encoder.
        t5: tokenizer of the text adapter's own embeddings.
        lengths: tokens of Qwen3, of T5.
        t5_rows: embeddings that the text adapter has.
    """

    def __init__(self, qwen3: Any, t5: Any, lengths: tuple[int, int], t5_rows: int) -> None:
        self.qwen3 = qwen3
        self.t5 = t5
        self.lengths = lengths
        self.t5_rows = t5_rows

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Qwen3 ids and mask [B, S], T5 ids and mask [B, T]."""
        tokens = []
        for tokenizer, length in zip((self.qwen3, self.t5), self.lengths, strict=True):
            made = tokenizer(
                list(texts),
                max_length=length,
                padding="max_length",
                padding_side="right",
                truncation=True,
                return_tensors="pt",
            )
            tokens += [made.input_ids.long(), made.attention_mask]
        return tokens

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        (qwen3,) = encoders
        if qwen3 is not None:
            check_vocabulary(self.qwen3, qwen3.config.vocab_size, name="Qwen3")
        check_vocabulary(self.t5, self.t5_rows, name="T5")


class AnimaTextEncodingStrategy(TextEncodingStrategy):
    """The last states of Qwen3; T5 tokens pass, since their embeddings are in the transformer's file."""

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> AnimaConditioning:
        """tokens: Qwen3 ids and mask, T5 ids and mask."""
        (qwen3,) = encoders
        ids, mask, t5_ids, t5_mask = tokens
        states = None
        if qwen3 is not None:
            device = next(qwen3.parameters()).device
            # an empty text has no token: its first place is seen all the same, no row may attend to nothing at all
            seen = mask.to(device).clone()
            seen[:, 0] = 1
            states = qwen3(ids.to(device), attention_mask=seen).last_hidden_state
            states = states.masked_fill(~mask.to(device).bool()[..., None], 0.0)
        return AnimaConditioning(prompt_embeds=states, attn_mask=mask, t5_input_ids=t5_ids, t5_attn_mask=t5_mask)

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return list(encoder.layers)


class AnimaLatentsCachingStrategy(LatentsCachingStrategy):
    """Latents normalised per channel."""

    def encode(self, vae: nn.Module, images: Tensor) -> Tensor:
        """See the base class."""
        return vae.encode(images)

    def encode_sample(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """See the base class."""
        return vae.encode(images, noise)


class AnimaTextOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Besides the fields: the share of dropped captions, which kohya-ss/sd-scripts reads from the file.

    Args:
        settings: see the base class.
        dropout: share of captions that are dropped. We take it from the options of each run.
    """

    def __init__(self, settings: Sequence[object], dropout: float) -> None:
        super().__init__(AnimaConditioning, settings, {})
        self.dropout = dropout

    def pack(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """See the base class."""
        return {**super().pack(conditioning), "caption_dropout_rate": torch.tensor(self.dropout, dtype=torch.float32)}


class AnimaDenoisingStrategy(FlowDenoisingStrategy):
    """Velocity prediction.

    Args:
        process: how noise levels are drawn and weighted.
    """

    latent_channels = 16
    spatial_factor = 8
    sample_defaults = SampleDefaults(
        steps=30,
        scale=7.5,
        multiple=16,
        sampler="euler",
        flow_shift=SAMPLE_SHIFT,
        reads=frozenset({"flow_shift"}),
    )
    gradient_inputs = frozenset({"x"})

    def __init__(self, process: RectifiedFlow) -> None:
        self.process = process

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The transformer's blocks; those of the text adapter are few and small."""
        return list(denoiser.blocks)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Cached latents are normalised already."""
        return latents

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return vae.decode(latents)

    def velocity(self, denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's output for noisy latents [B, C, H, W] at sigmas [B], as [B, C, H, W]."""
        dtype = next(denoiser.parameters()).dtype
        return denoiser(
            noisy.to(dtype),
            sigmas,
            conditioning.prompt_embeds.to(dtype),
            conditioning.attn_mask,
            conditioning.t5_input_ids,
            conditioning.t5_attn_mask,
        )

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The velocity."""
        return self.velocity(denoiser, inputs.noisy, inputs.timesteps / NUM_TIMESTEPS, conditioning)

    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """See the base class."""
        del request
        return self.velocity(denoiser, latents, sigmas, conditioning)


def _tokenizers(options: OptionSet) -> tuple[Any, Any]:
    """Those of Qwen3 and T5.

    Raises:
        UserError: one is found nowhere.
    """
    cache_dir = options.value("tokenizer_cache_dir")
    place = Path(options.value("qwen3"))
    home = place if place.is_dir() else place.parent
    beside = (home, home.parent / "tokenizer") if place.is_dir() else (home / "tokenizer",)
    qwen3 = load_tokenizer("Qwen2Tokenizer", QWEN3_TOKENIZER, cache_dir=cache_dir, beside=beside)
    own = options.value("t5_tokenizer_path")
    if own and find_tokenizer(T5_TOKENIZER, cache_dir=None, beside=(Path(own),)) != Path(own):
        message = "is no folder with a tokenizer (tokenizer.json or spiece.model); name another"
        raise UserError("--t5_tokenizer_path", own, message)
    places = (Path(own),) if own else (home.parent / "t5_tokenizer", home / "t5_tokenizer")
    return qwen3, load_tokenizer("T5Tokenizer", T5_TOKENIZER, cache_dir=cache_dir, beside=places)


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    lengths = options.value("qwen3_max_token_length"), options.value("t5_max_token_length")
    if lengths[1] != _PUBLISHED_T5_LENGTH:
        logger.warning(
            "--t5_max_token_length %d: image programs show the model %d text rows, so it is trained on another input",
            lengths[1],
            _PUBLISHED_T5_LENGTH,
        )
    qwen3, t5 = _tokenizers(options)
    return Strategies(
        tokenize=AnimaTokenizeStrategy(qwen3, t5, lengths, variant.config["params"].adapter.vocab_size),
        text_encoding=AnimaTextEncodingStrategy(),
        latents_caching=AnimaLatentsCachingStrategy(),
        text_outputs_caching=AnimaTextOutputsCachingStrategy(lengths, options.value("caption_dropout_rate")),
        denoising=AnimaDenoisingStrategy(flow_process(options, weighted=True)),
        conditioning=AnimaConditioning,
    )
