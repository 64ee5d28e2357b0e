"""How Stable Diffusion XL tokenizes, encodes, noises and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.batch import Conditioning
from library.diffusion.from_options import ddpm_process
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, load_tokenizer
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
TOKENIZER_2 = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
SCALE = 0.13025


@dataclass(frozen=True)
class SdxlConditioning(Conditioning):
    """Text states of both encoders and the pooled text of the second.

    Attributes:
        hidden_state1: of CLIP-L [B, 75*N+2, D1].
        hidden_state2: of OpenCLIP bigG [B, 75*N+2, D2].
        pool2: projected state of the first end of text [B, P].
    """

    hidden_state1: Tensor | None
    hidden_state2: Tensor | None
    pool2: Tensor | None


class SdxlTokenizeStrategy(TokenizeStrategy):
    """Tokens of both encoders; they share a vocabulary and differ in padding.

    Args:
        tokenizers: of CLIP-L and OpenCLIP bigG.
        max_token_length: of captions, without BOS and EOS; 75 when None.
        weighted: whether captions may weight words, as in (word:1.2).
    """

    def __init__(self, tokenizers: Sequence[Any], max_token_length: int | None, *, weighted: bool = False) -> None:
        self.prompts = [ClipPrompts(tokenizer, max_token_length, weighted=weighted) for tokenizer in tokenizers]

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids [B, N, 77] int64 of both, N windows; with weighted captions then weights [B, N, 77] float32 of both."""
        return self._joined([prompts.captions(texts) for prompts in self.prompts])

    def tokenize_prompt(self, text: str) -> list[Tensor]:
        """See `ClipPrompts.prompt`."""
        return self._joined([prompts.prompt(text) for prompts in self.prompts])

    def tokenize_beside(self, text: str, others: Sequence[str]) -> list[Tensor]:
        """See the base class: the states of both encoders lie side by side."""
        return self._joined([prompts.prompt(text, others) for prompts in self.prompts])

    def _joined(self, tokens: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Ids of both, then weights of both."""
        return [part for parts in zip(*tokens, strict=True) for part in parts]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        for prompts, encoder, name in zip(self.prompts, encoders, ("CLIP-L", "OpenCLIP bigG"), strict=True):
            if encoder is not None:
                check_vocabulary(prompts.tokenizer, encoder.config.vocab_size, name=name)


class SdxlTextEncodingStrategy(TextEncodingStrategy):
    """The states before the last layer of both encoders, and the second's pooled text.

    Args:
        tokenizer: of the second, whose state at the first end of text is pooled; read when it is first needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> SdxlConditioning:
        """tokens: ids [B, N, 77] of both, then weights [B, N, 77] of both by which the states are multiplied."""
        weights = tokens[2:] or (None, None)
        first, second, pooled = None, None, None
        if encoders[0] is not None:
            ids = tokens[0].to(next(encoders[0].parameters()).device)
            states = encoders[0](ids.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
            first = weighted_states(states, weights[0], ids.shape[1])
        if encoders[1] is not None:
            ids = tokens[1].to(next(encoders[1].parameters()).device)
            output = encoders[1].text_model(ids.flatten(0, 1), output_hidden_states=True)
            second = weighted_states(output.hidden_states[-2], weights[1], ids.shape[1])
            pooled = self._pooled(encoders[1], ids[:, 0], output.last_hidden_state[:: ids.shape[1]])
        return SdxlConditioning(hidden_state1=first, hidden_state2=second, pool2=pooled)

    def _pooled(self, encoder: nn.Module, ids: Tensor, states: Tensor) -> Tensor:
        """Projected states [B, 77, D] at the first end of text in ids [B, 77]; the first token's where there is none.

        transformers takes the largest id for the end, which added words have larger ones than.
        """
        places = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        return encoder.text_projection(states[torch.arange(len(ids), device=ids.device), places])

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        tower = getattr(encoder, "text_model", encoder)
        return list(tower.encoder.layers)


class SdxlDenoisingStrategy(UnetDenoisingStrategy):
    """Prediction of noise or velocity, told of the images' sizes."""

    def call(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, sizes: ImageSizes
    ) -> Tensor:
        """See the base class. Size conditioning: Podell et al., SDXL, 2023, section 2.2."""
        dtype = next(denoiser.parameters()).dtype
        context = torch.cat((conditioning.hidden_state1, conditioning.hidden_state2), dim=2)
        known = torch.cat((sizes.original, sizes.crop, sizes.target), dim=1).to(noisy.device, torch.float32)
        added = {"text_embeds": conditioning.pool2.to(dtype), "time_ids": known}
        return denoiser(noisy.to(dtype), times, context.to(dtype), added_cond_kwargs=added).sample


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    del variant
    folder = Path(options.value("pretrained_model_name_or_path")).parent
    cache_dir = options.value("tokenizer_cache_dir")
    tokenizers = [
        load_tokenizer("CLIPTokenizer", TOKENIZER, cache_dir=cache_dir, beside=(folder / "tokenizer",)),
        load_tokenizer("CLIPTokenizer", TOKENIZER_2, cache_dir=cache_dir, beside=(folder / "tokenizer_2",), pad_id=0),
    ]
    length, weighted = options.value("max_token_length"), options.value("weighted_captions")
    return Strategies(
        tokenize=SdxlTokenizeStrategy(tokenizers, length, weighted=weighted),
        text_encoding=SdxlTextEncodingStrategy(tokenizers[1]),
        latents_caching=AutoencoderLatents(),
        text_outputs_caching=TextEncoderOutputsCachingStrategy(SdxlConditioning, (length, weighted), {}),
        denoising=SdxlDenoisingStrategy(
            ddpm_process(options),
            SCALE,
            options.value("sample_sampler") or "ddim",
            inpainting=bool(options.values().get("train_inpainting")),
        ),
        conditioning=SdxlConditioning,
    )
