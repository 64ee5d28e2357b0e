"""What models with CLIP prompts and diffusers' U-Net share: windows of tokens, latents, denoising, sampling."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.base.emphasis import weighted_parts
from library.batch import Conditioning, StepInputs, TrainBatch
from library.diffusion.ddpm import Ddpm
from library.diffusion.inpainting import draw_mask
from library.modules import vae as autoencoder
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.sampling.samplers import Tick, make_scheduler, no_tick, run_scheduler, sampler_names
from library.strategy_base import DenoisingStrategy, guided

_WINDOW = 77  # tokens CLIP reads at once: BOS, 75 of text, EOS
_BODY = 75
_MOST_WINDOWS = 3  # of a sample prompt


class ClipPrompts:
    """CLIP tokens, cut into windows of 77 when longer captions are allowed.

    Args:
        tokenizer: of CLIP.
        max_token_length: of captions, without BOS and EOS; 75 when None.
        weighted: whether captions may weight words, as in (word:1.2).
    """

    def __init__(self, tokenizer: Any, max_token_length: int | None, *, weighted: bool = False) -> None:
        self.tokenizer = tokenizer
        self.length = (max_token_length or _BODY) + 2
        self.weighted = weighted

    def captions(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids [B, N, 77] int64, N windows; with weighted captions then weights [B, N, 77] float32."""
        if self.weighted:
            return self._weighted(texts, self.length)
        encoded = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return [self._windows(encoded.input_ids)]

    def prompt(self, text: str, others: Sequence[str] = ()) -> list[Tensor]:
        """As weighted captions, in as many windows as the longest of the texts needs, at most three."""
        windows = max(self._num_windows(one) for one in (text, *others))
        return self._weighted([text], windows * _BODY + 2)

    def _num_windows(self, text: str) -> int:
        tokens = sum(len(self._body(part)) for part, _ in weighted_parts(text))
        return min(_MOST_WINDOWS, max(1, -(-tokens // _BODY)))

    def _body(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _weighted(self, texts: Sequence[str], length: int) -> list[Tensor]:
        start, end, pad = self._special()
        ids = torch.full((len(texts), length), pad)
        weights = torch.ones(len(texts), length)
        for row, text in enumerate(texts):
            tokens = [(token, weight) for part, weight in weighted_parts(text) for token in self._body(part)]
            tokens = [(start, 1.0), *tokens[: length - 2], (end, 1.0)]
            ids[row, : len(tokens)] = torch.tensor([token for token, _ in tokens])
            weights[row, : len(tokens)] = torch.tensor([weight for _, weight in tokens])
        return [self._windows(ids), split_windows(weights)]

    def _special(self) -> tuple[int, int, int]:
        """Ids of BOS, EOS and padding."""
        tokenizer = self.tokenizer
        return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id

    def _windows(self, ids: Tensor) -> Tensor:
        """Windows of token ids; where padding is no EOS, every window gets an EOS after its text."""
        windows = split_windows(ids)
        _, end, pad = self._special()
        if windows.shape[1] == 1 or pad == end:
            return windows
        full = (windows[:, :, -2] != end) & (windows[:, :, -2] != pad)
        windows[:, :, -1] = torch.where(full, end, windows[:, :, -1])
        empty = windows[:, :, 1] == pad
        windows[:, :, 1] = torch.where(empty, end, windows[:, :, 1])
        return windows


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


def weighted_states(states: Tensor, weights: Tensor | None, windows: int) -> Tensor:
    """Text states [B*N, 77, D] of N windows -> [B, 75*N+2, D], each multiplied by its token's weight [B, N, 77]."""
    joined = join_windows(states, windows)
    if weights is None:
        return joined
    return joined * join_windows(weights.flatten(0, 1)[..., None], windows).to(joined)


@dataclass(frozen=True)
class ImageSizes:
    """What size conditioning tells of the images, each [B, 2] as (height, width) or (top, left), in pixels."""

    original: Tensor
    crop: Tensor
    target: Tensor

    @classmethod
    def whole(cls, height: int, width: int) -> "ImageSizes":
        """Of one uncut image of this size."""
        size = torch.tensor([[height, width]])
        return cls(size, torch.zeros_like(size), size)


class UnetDenoisingStrategy(DenoisingStrategy):
    """Prediction of noise or velocity with diffusers' U-Net.

    Args:
        process: noise schedule.
        scale: factor that gives latents unit variance.
        sampler: name of the method that makes sample images.
        inpainting: whether the model sees a mask and what is kept.
    """

    latent_channels = 4
    spatial_factor = 8
    sample_defaults = SampleDefaults(steps=30, scale=7.5)
    gradient_inputs = frozenset({"input_tensor", "hidden_states"})

    def __init__(self, process: Ddpm, scale: float, sampler: str = "ddim", *, inpainting: bool = False) -> None:
        self.process = process
        self.scale = scale
        self.sampler = sampler
        self.sample_defaults = replace(
            self.sample_defaults,
            sampler=sampler,
            samplers=sampler_names(zero_terminal=process.zero_terminal),
            sampler_note="those that can follow --zero_terminal_snr" if process.zero_terminal else "",
        )
        self.inpainting = inpainting

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Residual and transformer blocks, in the order of the forward pass."""
        return [m for m in denoiser.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Unit variance, as the U-Net was trained."""
        return latents * self.scale

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """See the base class."""
        return autoencoder.decode(vae, latents / self.scale)

    @abstractmethod
    def call(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, sizes: ImageSizes
    ) -> Tensor:
        """The model's output for what it sees [B, C, H, W] at timesteps [B], as [B, 4, H, W]."""

    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """The predicted noise or velocity."""
        seen = inputs.noisy if inputs.extra is None else torch.cat((inputs.noisy, inputs.extra), dim=1)
        batch = inputs.batch
        sizes = ImageSizes(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        return self.call(denoiser, seen, inputs.timesteps, conditioning, sizes)

    def extra_inputs(
        self, batch: TrainBatch, generators: Sequence[torch.Generator], latents_of: Callable[[TrainBatch], Tensor]
    ) -> Tensor | None:
        """Inpainting models see the mask and the latents of what is kept: 1 + 4 channels."""
        if not self.inpainting:
            return None
        assert batch.images is not None
        size = batch.images.shape[-2], batch.images.shape[-1]
        masks = torch.stack([draw_mask(generator, size) for generator in generators])[:, None]
        kept = latents_of(replace(batch, images=batch.images * (1 - masks), latents=None))
        return torch.cat((functional.interpolate(masks, size=kept.shape[-2:], mode="nearest"), kept), dim=1)

    def sample_latents(
        self,
        denoiser: nn.Module,
        request: SampleRequest,
        positive: Conditioning,
        negative: Conditioning | None,
        noise: Tensor,
        generator: torch.Generator,
        tick: Tick = no_tick,
    ) -> Tensor:
        """See the base class."""
        sizes = ImageSizes.whole(request.height, request.width)

        def predict(latents: Tensor, times: Tensor) -> Tensor:
            if self.inpainting:  # everything is to be made, nothing is kept
                latents = torch.cat((latents, torch.ones_like(latents[:, :1]), torch.zeros_like(latents)), dim=1)
            wanted = self.call(denoiser, latents, times, positive, sizes)
            unwanted = None if negative is None else self.call(denoiser, latents, times, negative, sizes)
            return guided(wanted, unwanted, request.scale).float()

        scheduler = make_scheduler(
            request.sampler or self.sampler,
            velocity=self.process.velocity,
            zero_terminal=self.process.zero_terminal,
        )
        return run_scheduler(scheduler, predict, noise, request.steps, generator, tick)
