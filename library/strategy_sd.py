"""How Stable Diffusion 1.x tokenizes, encodes, noises and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.batch import Conditioning, StepInputs
from library.diffusion.ddpm import NUM_TIMESTEPS, Ddpm
from library.modules import vae as autoencoder
from library.modules.components import Variant
from library.modules.tokenizers import check_vocabulary, load_tokenizer
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.sampling.samplers import run_scheduler
from library.strategy_base import (
    DenoisingStrategy,
    LatentsCachingStrategy,
    Strategies,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    guided,
)

TOKENIZER = "openai/clip-vit-large-patch14"
SCALE = 0.18215
_WINDOW = 77  # tokens CLIP reads at once: BOS, 75 of text, EOS
_BODY = 75


@dataclass(frozen=True)
class SdConditioning(Conditioning):
    """`hidden`: text states [B, 75*N+2, D]."""

    hidden: Tensor | None


class SdTokenizeStrategy(TokenizeStrategy):
    """CLIP tokens, cut into windows of 77 when longer captions are allowed."""

    def __init__(self, tokenizer: Any, max_token_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.length = (max_token_length or _BODY) + 2

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """[B, N, 77] int64, N windows."""
        encoded = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return [split_windows(encoded.input_ids)]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        if encoders[0] is not None:
            check_vocabulary(self.tokenizer, encoders[0].config.vocab_size, name="CLIP")


def split_windows(ids: Tensor) -> Tensor:
    """Token ids [B, L] -> windows [B, N, 77]: each has the BOS and the last id around 75 ids."""
    if ids.shape[1] <= _WINDOW:
        return ids[:, None]
    starts = range(1, ids.shape[1] - _WINDOW + 2, _BODY)
    windows = [torch.cat((ids[:, :1], ids[:, start : start + _BODY], ids[:, -1:]), dim=1) for start in starts]
    return torch.stack(windows, dim=1)


def join_windows(states: Tensor, windows: int) -> Tensor:
    """Text states [B*N, 77, D] -> [B, 75*N+2, D]: the first BOS, the bodies, the last EOS."""
    if windows == 1:
        return states
    states = states.unflatten(0, (-1, windows))
    body = states[:, :, 1 : _BODY + 1].flatten(1, 2)
    return torch.cat((states[:, 0, :1], body, states[:, -1, -1:]), dim=1)


class SdTextEncodingStrategy(TextEncodingStrategy):
    """The text states of CLIP's last layer, or of an earlier one with clip_skip."""

    def __init__(self, clip_skip: int | None) -> None:
        self.clip_skip = clip_skip

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> SdConditioning:
        """tokens: [B, N, 77]."""
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
        return SdConditioning(hidden=join_windows(states, ids.shape[1]))

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return list(encoder.encoder.layers)


class SdLatentsCachingStrategy(LatentsCachingStrategy):
    """Unscaled latents of the four-channel autoencoder."""

    def encode(self, vae: nn.Module, images: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.encode_mode(vae, images)

    def encode_sample(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.encode_sample(vae, images, noise)


class SdDenoisingStrategy(DenoisingStrategy):
    """Noise prediction with diffusers' U-Net."""

    latent_channels = 4
    spatial_factor = 8
    sample_defaults = SampleDefaults(steps=30, scale=7.5)
    gradient_inputs = frozenset({"input_tensor", "hidden_states"})

    def __init__(self, process: Ddpm, sampler: str = "ddim") -> None:
        self.process = process
        self.sampler = sampler

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Residual and transformer blocks, in the order of the forward pass."""
        return [m for m in denoiser.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Unit variance, as the U-Net was trained."""
        return latents * SCALE

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / SCALE)

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The predicted noise."""
        return _predict_noise(denoiser, inputs.noisy, inputs.timesteps, conditioning)

    def sample_latents(
        self,
        denoiser: nn.Module,
        request: SampleRequest,
        positive: Conditioning,
        negative: Conditioning | None,
        noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """See the base class."""

        def predict(latents: Tensor, times: Tensor) -> Tensor:
            wanted = _predict_noise(denoiser, latents, times, positive)
            unwanted = None if negative is None else _predict_noise(denoiser, latents, times, negative)
            return guided(wanted, unwanted, request.scale).float()

        return run_scheduler(request.sampler or self.sampler, predict, noise, request.steps, generator)


def _predict_noise(denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
    dtype = next(denoiser.parameters()).dtype
    return denoiser(noisy.to(dtype), times, conditioning.hidden.to(dtype)).sample


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    del variant
    low, high = options.value("min_timestep"), options.value("max_timestep")
    process = Ddpm(min_timestep=0 if low is None else low, max_timestep=NUM_TIMESTEPS if high is None else high)
    source = Path(options.value("pretrained_model_name_or_path"))
    tokenizer = load_tokenizer(
        "CLIPTokenizer",
        TOKENIZER,
        cache_dir=options.value("tokenizer_cache_dir"),
        beside=(source.parent / "tokenizer", source / "tokenizer"),
    )
    return Strategies(
        tokenize=SdTokenizeStrategy(tokenizer, options.value("max_token_length")),
        text_encoding=SdTextEncodingStrategy(options.value("clip_skip")),
        latents_caching=SdLatentsCachingStrategy(),
        text_outputs_caching=TextEncoderOutputsCachingStrategy(
            SdConditioning, (options.value("max_token_length"), options.value("clip_skip")), {}
        ),
        denoising=SdDenoisingStrategy(process, options.value("sample_sampler") or "ddim"),
        conditioning=SdConditioning,
    )
