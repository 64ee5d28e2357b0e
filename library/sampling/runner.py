"""Make the sample images of an occasion."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from library.base.randomness import address, seeded_globals
from library.batch import Conditioning
from library.sampling.images import find_image, sample_path, save_png, time_stamp, write_sheet
from library.sampling.progress import SampleProgress, say
from library.sampling.prompts import SampleRequest
from library.sampling.samplers import Tick, no_tick

OnImage = Callable[[Path, SampleRequest, str], None]  # (file, its request with the seed, occasion)


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
        tick: Tick,
    ) -> Tensor:
        """Denoised latents [1, C, H, W]; `tick` is told of steps."""
        ...

    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Images [1, 3, h, w] in [-1, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """Everything that turns a request into an image.

    Attributes:
        maker: of the family.
        denoiser: the model, with its adapters.
        vae: decoder; on the device for decoding only.
        condition: (prompt, negative=whether it says what not to show) -> conditioning on the device.
        device: where the model computes.
        autocast: makes the context the denoiser runs in.
    """

    maker: ImageMaker
    denoiser: nn.Module
    vae: nn.Module
    condition: Callable[..., Conditioning]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]

    def make(self, request: SampleRequest, tick: Tick = no_tick) -> Tensor:
        """One image [3, h, w] in [-1, 1], on the CPU; a function of weights and request.

        Args:
            request: with a seed. Draws of others are not touched.
            tick: is told of the denoising steps.
        """
        assert request.seed is not None
        with seeded_globals(request.seed), torch.no_grad():
            return self._make(request, torch.Generator().manual_seed(request.seed), tick)[0].cpu()

    def _make(self, request: SampleRequest, generator: torch.Generator, tick: Tick) -> Tensor:
        factor = self.maker.spatial_factor
        shape = 1, self.maker.latent_channels, request.height // factor, request.width // factor
        noise = torch.randn(shape, generator=generator).to(self.device)
        positive = self.condition(request.prompt)
        negative = self.condition(request.negative, negative=True) if request.scale != 1.0 else None
        with self.autocast():
            latents = self.maker.sample_latents(self.denoiser, request, positive, negative, noise, generator, tick)
        home = next(self.vae.parameters()).device
        self.vae.to(self.device)
        image = self.maker.decode(self.vae, latents.float())
        self.vae.to(home)
        return image


@dataclass(frozen=True, kw_only=True)
class SampleTarget:
    """Where sample images go to.

    Attributes:
        folder: of the images.
        output_name: start of their names.
        model: name of the base model.
        seed: of the run, for prompts without one.
        rank: of this process; the first one writes sheets and talks.
        world_size: processes, which share the prompts.
        wait_for_all: returns when every process is there.
    """

    folder: Path
    output_name: str | None
    model: str
    seed: int
    rank: int = 0
    world_size: int = 1
    wait_for_all: Callable[[], None] = lambda: None


class SampleRunner:
    """Makes one image per prompt; several processes take the prompts in turn.

    Args:
        model: makes the images.
        requests: what to make, for all processes.
        target: where images go.
        on_image: is told of every image: by the process that made it, and the first process of those of others too,
            as far as it sees their files.
    """

    def __init__(
        self,
        model: ImageModel,
        requests: Sequence[SampleRequest],
        target: SampleTarget,
        on_image: OnImage | None = None,
    ) -> None:
        self.model = model
        self.target = target
        self.on_image = on_image
        self.requests = [
            request
            if request.seed is not None
            else replace(request, seed=address(target.seed, "sample", request.index) % 2**32)
            for request in requests
        ]
        self.written: list[Path] = []

    def run(self, occasion: str) -> None:
        """Make all images of an occasion ("e000001", "000100"); draws of training are not touched."""
        target = self.target
        own = self.requests[target.rank :: target.world_size]
        since = time_stamp()
        made: dict[int, Path] = {}
        with SampleProgress(own, f"samples {occasion}", show=target.rank == 0) as progress:
            for request in own:
                progress.begin(request)
                image = self.model.make(request, progress.tick)
                path = sample_path(target.folder, target.output_name, occasion, request)
                save_png(image, path, request, target.model)
                made[request.index] = path
                self._tell(path, request, occasion)
        self.written += made.values()
        if target.world_size > 1:
            target.wait_for_all()
        if target.rank == 0:
            self._finish(occasion, made, since, progress)

    def _finish(self, occasion: str, made: dict[int, Path], since: str, progress: SampleProgress) -> None:
        """Collect what other processes made, write the sheet, say what there is."""
        target = self.target
        for request in self.requests:
            if request.index not in made:
                found = find_image(target.folder, target.output_name, occasion, request, since)
                if found is not None:
                    made[request.index] = found
                    self._tell(found, request, occasion)
        there = [(made[request.index], request) for request in self.requests if request.index in made]
        sheet = ""
        if len(there) > 1:
            sheet = f", together in {write_sheet(there, target.folder, target.output_name, occasion).name}"
        number = f"{len(there)} image{'s' * (len(there) != 1)}"
        say("samples %s: %s in %.1f s in %s%s", occasion, number, progress.seconds, target.folder, sheet)

    def _tell(self, path: Path, request: SampleRequest, occasion: str) -> None:
        if self.on_image is not None:
            self.on_image(path, request, occasion)
