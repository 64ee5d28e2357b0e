"""How Lumina Image 2.0 tokenizes, encodes, noises and predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.logs import logger
from library.batch import Conditioning, StepInputs
from library.diffusion.flow import NUM_TIMESTEPS, RectifiedFlow
from library.diffusion.from_options import flow_process
from library.diffusion.process import per_sample
from library.modules import vae as autoencoder
from library.modules.components import Variant
from library.modules.gemma2 import embedded_tokenizer
from library.modules.loading import open_model_file
from library.modules.tokenizers import check_vocabulary, find_tokenizer, load_tokenizer
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

TOKENIZER = "google/gemma-2-2b"
SCALE = 0.3611
SHIFT = 0.1159
_TOKENS = 256
# transformers pads this tokenizer on the left, adds a token where its files name none for masks, and begins texts with
# BOS only where its files say so
_TOKENIZER_SETTINGS = {"padding_side": "right", "mask_token": "<pad>", "add_bos_token": True}
_FLOW_SHIFT = 6.0


@dataclass(frozen=True)
class LuminaConditioning(Conditioning):
    """`hidden_state` [B, T, D], `input_ids` [B, T] int64, `attention_mask` [B, T] int64 (1 = a real token)."""

    hidden_state: Tensor | None
    input_ids: Tensor | None
    attention_mask: Tensor | None


class LuminaTokenizeStrategy(TokenizeStrategy):
    """Gemma tokens behind the system prompt, padded on the right.

    An empty text stays empty: a dropped caption is then what samples have for an empty negative prompt.

    Args:
        gemma: tokenizer.
        length: tokens of every caption.
        system_prompt: instruction put before captions.
        negative_too: put it before negative prompts too.
    """

    def __init__(self, gemma: Any, length: int, system_prompt: str = "", *, negative_too: bool = False) -> None:
        self.gemma = gemma
        self.length = length
        self.prefix = f"{system_prompt} <Prompt Start> " if system_prompt else ""
        self.negative_too = negative_too

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids [B, T], mask [B, T]."""
        return self._tokens([self.prefix + text if text else "" for text in texts])

    def tokenize_negative(self, text: str) -> list[Tensor]:
        """See the base class."""
        return self.tokenize([text]) if self.negative_too else self._tokens([text])

    def _tokens(self, texts: list[str]) -> list[Tensor]:
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found = self.gemma(texts, max_length=self.length, **padded)
        return [found.input_ids, found.attention_mask]

    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """See the base class."""
        (gemma,) = encoders
        if gemma is not None:
            check_vocabulary(self.gemma, gemma.config.vocab_size, name="Gemma")


class LuminaTextEncodingStrategy(TextEncodingStrategy):
    """The states that Gemma's last block receives."""

    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> LuminaConditioning:
        """tokens: ids, mask."""
        (gemma,) = encoders
        ids, mask = tokens
        if gemma is None:
            return LuminaConditioning(hidden_state=None, input_ids=None, attention_mask=None)
        device = next(gemma.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states = gemma(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return LuminaConditioning(hidden_state=states[-2], input_ids=ids, attention_mask=mask)

    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return list(encoder.layers)


class LuminaDenoisingStrategy(FlowDenoisingStrategy):
    """Velocity prediction; the model itself tells the direction from noise to image, at a time that is 1 - sigma.

    Args:
        process: how noise levels are drawn and weighted.
        prediction_type: `raw` compares the output itself; `additive` output + noisy; `sigma_scaled` the image that the
            output leads to, noisy + sigma * output. All of them are compared with image - noise.
    """

    latent_channels = 16
    spatial_factor = 8
    sample_defaults = SampleDefaults(
        steps=36,
        scale=3.5,
        size=1024,
        multiple=16,
        sampler="euler",
        flow_shift=_FLOW_SHIFT,
        cfg_trunc_ratio=0.25,
        renorm_cfg=1.0,
        reads=frozenset({"flow_shift", "cfg_trunc_ratio", "renorm_cfg"}),
    )
    gradient_inputs = frozenset({"x"})

    def __init__(self, process: RectifiedFlow, *, prediction_type: str) -> None:
        self.process = process
        self.prediction_type = prediction_type

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Refiners, then the main blocks."""
        return [*denoiser.context_refiner, *denoiser.noise_refiner, *denoiser.layers]

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Cached latents are normalised already."""
        return latents

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / SCALE + SHIFT)

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """Noise - image, or what `prediction_type` makes of the model's output, with the sign of the target."""
        sigmas = inputs.timesteps / NUM_TIMESTEPS
        output = direction(denoiser, inputs.noisy, sigmas, *valid_text(conditioning))
        if self.prediction_type == "additive":
            output = output + inputs.noisy
        if self.prediction_type == "sigma_scaled":
            output = inputs.noisy + per_sample(inputs.sigmas, output) * output
        return -output

    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """See the base class."""
        del request
        return -direction(denoiser, latents, sigmas, *valid_text(conditioning))

    def is_guided(self, request: SampleRequest, sigma: float) -> bool:
        """While the model's time is below `cfg_trunc_ratio`."""
        return 1 - sigma < (1.0 if request.cfg_trunc_ratio is None else request.cfg_trunc_ratio)

    def guide(self, request: SampleRequest, positive: Conditioning) -> Guidance:
        """Classifier-free guidance that may let the norm grow by `renorm_cfg`."""
        del positive
        return lambda wanted, unwanted: renormed(guided(wanted, unwanted, request.scale), wanted, request.renorm_cfg)


def valid_text(conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
    """Text states cut to the longest text of the batch [B, T', D], and their mask [B, T']; None where all are valid.

    Without a mask every attention back end can use its kernels.
    """
    mask = conditioning.attention_mask
    lengths = mask.sum(dim=1).tolist()  # one wait for the device in a step
    longest = int(max(lengths))
    mask = None if min(lengths) == longest else mask[:, :longest]
    return conditioning.hidden_state[:, :longest], mask


def direction(denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """The model's output (image - noise) for noisy latents [B, C, H, W] at sigmas [B], as [B, C, H, W]."""
    dtype = next(denoiser.parameters()).dtype
    return denoiser(noisy.to(dtype), 1 - sigmas, text.to(dtype), mask)


def renormed(output: Tensor, reference: Tensor, factor: float | None) -> Tensor:
    """The output with each sample's norm held below `factor` times that of the reference; 0 and None hold nothing."""
    if not factor:
        return output
    axes = tuple(range(1, output.ndim))
    norm = torch.linalg.vector_norm(output.float(), dim=axes, keepdim=True)
    largest = factor * torch.linalg.vector_norm(reference.float(), dim=axes, keepdim=True)
    return output * (largest / norm.clamp(min=1e-12)).clamp(max=1.0)


def _tokenizer(options: OptionSet) -> Any:
    """From a folder; else from the file of the text encoder, where it carries one; else from the hub."""
    places = (Path(options.value("gemma2")).parent / "tokenizer",)
    cache_dir = options.value("tokenizer_cache_dir")
    if find_tokenizer(TOKENIZER, cache_dir=cache_dir, beside=places) is None:
        embedded = embedded_tokenizer(open_model_file("--gemma2", options.value("gemma2")))
        places = places if embedded is None else (embedded,)
    return load_tokenizer("GemmaTokenizer", TOKENIZER, cache_dir=cache_dir, beside=places, settings=_TOKENIZER_SETTINGS)


def build_strategies(options: OptionSet, variant: Variant) -> Strategies:
    """The strategies of a run with these options."""
    del variant
    length = options.value("gemma2_max_token_length") or _TOKENS
    prompt = options.value("system_prompt")
    prediction_type = options.value("model_prediction_type")
    if prediction_type != "raw":
        logger.warning(
            "--model_prediction_type %s changes the prediction but not what it is compared with; use raw",
            prediction_type,
        )
    return Strategies(
        tokenize=LuminaTokenizeStrategy(
            _tokenizer(options), length, prompt, negative_too=options.value("add_system_prompt_to_negative_prompt")
        ),
        text_encoding=LuminaTextEncodingStrategy(),
        latents_caching=autoencoder.AutoencoderLatents(SHIFT, SCALE),
        text_outputs_caching=TextEncoderOutputsCachingStrategy(LuminaConditioning, (length, prompt), {}),
        denoising=LuminaDenoisingStrategy(
            flow_process(options, weighted=prediction_type == "sigma_scaled"), prediction_type=prediction_type
        ),
        conditioning=LuminaConditioning,
    )
