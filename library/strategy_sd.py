"""How Stable Diffusion 1.x and 2.x tokenize, encode, noise and predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.batch import Conditioning
from library.diffusion.from_options import ddpm_process
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, find_tokenizer, load_tokenizer
from library.modules.vae import AutoencoderLatents
from library.options.schema import OptionSet
from library.strategy_base import (
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)
from library.strategy_unet import (
    ClipPrompts,
    ImageSizes,
    UnetDenoisingStrategy,
    weighted_states,
)

TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_V2 = "stabilityai/stable-diffusion-2"  # gone from the hub; local copies have this name
SCALE = 0.18215


@dataclass(frozen=True)
class SdConditioning(Conditioning):
    """`hidden`: text states [B, 75*N+2, D]."""

    hidden: Tensor | None


class SdTokenizeStrategy(TokenizeStrategy):
    """CLIP's tokens; arguments as of `ClipPrompts`."""

    def __init__(self, tokenizer: Any, max_token_length: int | None, *, weighted: bool = False) -> None:
        self.prompts = ClipPrompts(tokenizer, max_token_length, weighted=weighted)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids [B, N, 77] int64, N windows; with weighted captions then weights [B, N, 77] float32."""
        return self.prompts.captions(texts)

    def tokenize_prompt(self, text: str) -> list[Tensor]:
        """See `ClipPrompts.prompt`."""
        return self.prompts.prompt(text)

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        if encoders[0] is not None:
            check_vocabulary(self.prompts.tokenizer, encoders[0].config.vocab_size, name="CLIP")


class SdTextEncodingStrategy(TextEncodingStrategy):
    """The text states of CLIP's last layer, or of an earlier one with clip_skip."""

    def __init__(self, clip_skip: int | None) -> None:
        self.clip_skip = clip_skip

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> SdConditioning:
        """tokens: ids [B, N, 77], and weights [B, N, 77] by which the states are multiplied."""
        encoder = encoders[0]
        if encoder is None:
            return SdConditioning(hidden=None)
        ids = tokens[0].to(next(encoder.parameters()).device)
        flat = ids.flatten(0, 1)
        if self.clip_skip is None:
            states = encoder(flat).last_hidden_state
        else:
            output = encoder(flat, output_hidden_states=True)
            states = encoder.final_layer_norm(output.hidden_states[-self.clip_skip])
        weights = tokens[1] if len(tokens) > 1 else None
        return SdConditioning(hidden=weighted_states(states, weights, ids.shape[1]))

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return list(encoder.encoder.layers)


class SdDenoisingStrategy(UnetDenoisingStrategy):
    """Prediction of noise or velocity."""

    def call(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, sizes: ImageSizes
    ) -> Tensor:
        """See the base class; these models know nothing of sizes."""
        del sizes
        dtype = next(denoiser.parameters()).dtype
        return denoiser(noisy.to(dtype), times, conditioning.hidden.to(dtype)).sample


def _tokenizer(options: OptionSet, variant: Variant) -> Any:
    """CLIP's tokenizer; that of version 2.x pads with id 0 and has the same vocabulary."""
    source = Path(options.value("pretrained_model_name_or_path"))
    beside = (source.parent / "tokenizer", source / "tokenizer")
    cache_dir = options.value("tokenizer_cache_dir")
    if variant.name == "v2" and find_tokenizer(TOKENIZER_V2, cache_dir=cache_dir, beside=beside):
        return load_tokenizer("CLIPTokenizer", TOKENIZER_V2, cache_dir=cache_dir, beside=beside, pad_id=0)
    pad = 0 if variant.name == "v2" else None
    return load_tokenizer("CLIPTokenizer", TOKENIZER, cache_dir=cache_dir, beside=beside, pad_id=pad)


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    tokenizer, weighted = _tokenizer(options, variant), options.value("weighted_captions")
    return Strategies(
        tokenize=SdTokenizeStrategy(tokenizer, options.value("max_token_length"), weighted=weighted),
        text_encoding=SdTextEncodingStrategy(options.value("clip_skip")),
        latents_caching=AutoencoderLatents(),
        text_outputs_caching=TextEncoderOutputsCachingStrategy(
            SdConditioning,
            (options.value("max_token_length"), options.value("clip_skip"), variant.name, weighted),
            {},
        ),
        denoising=SdDenoisingStrategy(
            ddpm_process(options),
            SCALE,
            options.value("sample_sampler") or "ddim",
            inpainting=bool(options.values().get("train_inpainting")),
        ),
        conditioning=SdConditioning,
    )
