"""Make the sample images of an occasion."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from library.base.logs import logger
from library.base.randomness import address, seeded_globals
from library.batch import Conditioning
from library.sampling.images import sample_path, save_png
from library.sampling.prompts import SampleRequest


class ImageMaker(Protocol):
    """The part of a family's denoising that makes images."""

    latent_channels: int
    spatial_factor: int

    def sample_latents(
        self,
        denoiser: nn.Module,
        request: SampleRequest,
        positive: Conditioning,
        negative: Conditioning | None,
        noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Denoised latents [1, C, H, W]."""
        ...

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Images [1, 3, h, w] in [-1, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleTarget:
    """Where sample images come from and go to.

    Attributes:
        folder: of the images.
        output_name: start of their names.
        seed: of the run, for prompts without one.
        device: where the model computes.
    """

    folder: Path
    output_name: str | None
    seed: int
    device: torch.device


class SampleRunner:
    """Makes one image per prompt.

    Args:
        maker: of the family.
        denoiser: the trained model.
        vae: decoder; moved to the device for decoding only.
        condition: prompt -> conditioning on the device.
        requests: what to make; this process's share.
        target: where images go, and on what they are made.
        autocast: makes the context the denoiser runs in.
    """

    def __init__(
        self,
        maker: ImageMaker,
        denoiser: nn.Module,
        vae: nn.Module,
        condition: Callable[[str], Conditioning],
        requests: Sequence[SampleRequest],
        target: SampleTarget,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.maker = maker
        self.denoiser = denoiser
        self.vae = vae
        self.condition = condition
        self.requests = list(requests)
        self.target = target
        self.autocast = autocast
        self.written: list[Path] = []

    def run(self, occasion: str) -> None:
        """Make all images of an occasion ("e000001", "000100"); draws of training are not touched."""
        for request in self.requests:
            seed = request.seed
            if seed is None:
                seed = address(self.target.seed, "sample", request.index) % 2**32
            with seeded_globals(seed), torch.no_grad():
                image = self.make(replace(request, seed=seed), seed)
            path = sample_path(self.target.folder, self.target.output_name, occasion, request, seed)
            save_png(image[0], path, replace(request, seed=seed))
            self.written.append(path)
            logger.info("sample image: %s", path)

    def make(self, request: SampleRequest, seed: int) -> Tensor:
        """One image [1, 3, h, w] in [-1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        factor = self.maker.spatial_factor
        shape = 1, self.maker.latent_channels, request.height // factor, request.width // factor
        noise = torch.randn(shape, generator=generator).to(self.target.device)
        positive = self.condition(request.prompt)
        negative = self.condition(request.negative) if request.scale != 1.0 else None
        with self.autocast():
            latents = self.maker.sample_latents(self.denoiser, request, positive, negative, noise, generator)
        home = next(self.vae.parameters()).device
        self.vae.to(self.target.device)
        image = self.maker.decode(self.vae, latents.float())
        self.vae.to(home)
        return image.cpu()
