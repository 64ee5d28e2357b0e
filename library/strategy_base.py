"""The strategies of a model family: how it tokenizes, encodes text and images, noises and predicts.

Strategies hold configuration, never models: models are arguments, so one object serves training, caching and inference,
and can be sent to worker processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from library.batch import Conditioning, StepInputs, TrainBatch
from library.diffusion.flow import shifted
from library.diffusion.process import NoiseProcess
from library.sampling.prompts import SampleDefaults, SampleRequest
from library.sampling.samplers import Tick, no_tick, run_euler_flow

Guidance = Callable[[Tensor, Tensor], Tensor]
"""(velocity of the prompt, velocity of the negative prompt) -> velocity that is followed, all [B, C, H, W]."""


class TokenizeStrategy(ABC):
    """Captions to token ids."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """int64 tensors of the batch: one per tokenizer, then attention masks where the family needs them."""

    def tokenize_prompt(self, text: str) -> list[Tensor]:
        """As `tokenize`, of one prompt of a sample image."""
        return self.tokenize([text])

    def tokenize_beside(self, text: str, others: Sequence[str]) -> list[Tensor]:
        """As `tokenize_prompt`, where other encoders read `others`: as long as states that are joined have to be."""
        del others
        return self.tokenize_prompt(text)

    def tokenize_negative(self, text: str) -> list[Tensor]:
        """As `tokenize_prompt`, of what a sample image is not to show."""
        return self.tokenize_prompt(text)

    @abstractmethod
    def check_vocabularies(self, encoders: Sequence[nn.Module | None]) -> None:
        """Raise UserError when a tokenizer can make ids that its encoder has no embedding for."""


class TextEncodingStrategy(ABC):
    """Token ids to conditioning."""

    @abstractmethod
    def encode_tokens(self, tokens: Sequence[Tensor], encoders: Sequence[nn.Module | None]) -> Conditioning:
        """Run the encoders; grad mode and autocast are the caller's. An absent encoder leaves its fields None."""

    def trained_encoders(self, encoders: Sequence[nn.Module | None], network: nn.Module) -> list[bool]:
        """Which encoders an adapter changes when text encoders are trained at all."""
        del network
        return [encoder is not None for encoder in encoders]

    @abstractmethod
    def blocks(self, encoder: nn.Module) -> list[nn.Module]:
        """The repeated blocks of one of the family's encoders, for gradient checkpointing."""


class LatentsCachingStrategy(ABC):
    """Images to latents as the family's cache holds them."""

    @abstractmethod
    def encode(self, vae: nn.Module, images: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> [B, C, H, W] float32, the posterior's mode."""

    @abstractmethod
    def encode_sample(self, vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
        """As `encode`, but a posterior sample made with the given unit noise [B, C, H, W]."""


class TextEncoderOutputsCachingStrategy:
    """Conditioning to the arrays of a cache file and back; by default one array per field.

    Args:
        conditioning: the family's class.
        settings: what the outputs depend on besides caption and encoder weights: token lengths, masks, templates.
        flags: arrays without dimensions that other programs compare with their own settings.
    """

    def __init__(
        self, conditioning: type[Conditioning], settings: Sequence[object], flags: Mapping[str, bool | float]
    ) -> None:
        self.conditioning = conditioning
        self.settings = tuple(settings)
        self.flags = dict(flags)

    def pack(self, conditioning: Conditioning) -> dict[str, Tensor]:
        """Conditioning of one sample [1, ...] -> arrays [...]."""
        values = {f.name: getattr(conditioning, f.name) for f in fields(conditioning)}
        return {name: value[0] for name, value in values.items() if value is not None} | {
            name: torch.tensor(value) for name, value in self.flags.items()
        }

    def unpack(self, arrays: Mapping[str, Tensor]) -> Conditioning:
        """Arrays [...] -> conditioning of one sample [1, ...], floats in float32."""
        wanted = {f.name: arrays[f.name][None] for f in fields(self.conditioning)}
        return self.conditioning(**{name: v.float() if v.is_floating_point() else v for name, v in wanted.items()})

    def collate(self, items: list[Conditioning]) -> Conditioning:
        """Join samples along the batch axis."""
        return self.conditioning.collate(items)


class DenoisingStrategy(ABC):
    """How a family noises, is called, and is judged: all that the loss path needs."""

    process: NoiseProcess
    latent_channels: int
    spatial_factor: int
    sample_defaults: SampleDefaults
    # inputs of blocks that carry gradients in training; marked so, a block has one graph wherever it stands
    gradient_inputs: frozenset[str] = frozenset()

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in execution order: the units of checkpointing, compiling and swapping."""

    @abstractmethod
    def scale_latents(self, latents: Tensor) -> Tensor:
        """Cached latents -> what noise is added to."""

    def extra_inputs(
        self, batch: TrainBatch, generators: Sequence[torch.Generator], latents_of: Callable[[TrainBatch], Tensor]
    ) -> Tensor | None:
        """Channels that the model sees beside the noisy latents [B, E, H, W]; None for most models.

        Args:
            batch: what was read.
            generators: one per image.
            latents_of: scaled latents of a batch.
        """
        del batch, generators, latents_of

    def draw(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """What is drawn for each image of a training step besides noise, by name, each [B, ...]; mostly nothing.

        Args:
            generators: one per image.
        """
        del generators
        return {}

    def expect_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Told once which training resolutions (width, height) the datasets have; most models need not know."""
        del sizes

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Model-space latents [B, C, H, W] -> images [B, 3, h, w] in [-1, 1]."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """Prediction [B, C, H, W] in the units of `inputs.target`."""

    @abstractmethod
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
        """Denoise unit noise [1, C, H, W]; `negative` is None without guidance, `tick` is told of steps."""


class FlowDenoisingStrategy(DenoisingStrategy):
    """A family whose model gives the velocity of a straight flow: its images are made with Euler steps."""

    @abstractmethod
    def sample_velocity(
        self, denoiser: nn.Module, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, request: SampleRequest
    ) -> Tensor:
        """Noise - image, for noisy latents [B, C, H, W] at sigmas [B], as [B, C, H, W]."""

    def sample_levels(self, request: SampleRequest, noise: Tensor) -> Tensor:
        """Noise levels from 1 to 0 [steps + 1] float32, by default evenly spaced and shifted."""
        del noise
        shift = self.sample_defaults.flow_shift if request.flow_shift is None else request.flow_shift
        levels = torch.linspace(1, 0, request.steps + 1, dtype=torch.float64)
        return shifted(levels, 1.0 if shift is None else shift).float()

    def is_guided(self, request: SampleRequest, sigma: float) -> bool:
        """Whether the negative prompt is looked at from this noise level on."""
        del request, sigma
        return True

    def guide(self, request: SampleRequest, positive: Conditioning) -> Guidance:
        """Joins the velocities of both prompts; called once for an image, so it may remember steps."""
        del positive
        return lambda wanted, unwanted: guided(wanted, unwanted, request.scale)

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
        """See the base class; the sum is kept in float32."""
        del generator
        levels, join = self.sample_levels(request, noise), self.guide(request, positive)
        guides = iter([self.is_guided(request, level) for level in levels.tolist()])

        def predict(latents: Tensor, sigmas: Tensor) -> Tensor:
            wanted = self.sample_velocity(denoiser, latents, sigmas, positive, request)
            if not next(guides) or negative is None:
                return wanted
            return join(wanted, self.sample_velocity(denoiser, latents, sigmas, negative, request))

        return run_euler_flow(predict, noise, levels, tick)


@dataclass(frozen=True)
class Strategies:
    """The strategies of one model in one run."""

    tokenize: TokenizeStrategy
    text_encoding: TextEncodingStrategy
    latents_caching: LatentsCachingStrategy
    text_outputs_caching: TextEncoderOutputsCachingStrategy
    denoising: DenoisingStrategy
    conditioning: type[Conditioning]


def guided(positive: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance: negative + scale * (positive - negative) (Ho and Salimans, 2022)."""
    return positive if negative is None else negative + scale * (positive - negative)
