"""Everything random or data-dependent of a micro-step, made in one place."""

from typing import Protocol

import torch

from library.base.randomness import address
from library.batch import StepInputs, TrainBatch
from library.data import attributes
from library.diffusion.noise import draw_noise, item_generators
from library.strategy_base import DenoisingStrategy
from library.training.latents import LatentSource


class StepInputsSource(Protocol):
    """Makes the inputs of a micro-step from its batch."""

    def assemble(self, batch: TrainBatch) -> StepInputs:
        """All random and data-dependent parts of the batch's micro-step, on the device."""
        ...


class StepAssembler:
    """Draws noise and noise levels from addresses.

    Args:
        denoising: of the family.
        latents: where latents come from.
        seed: of the run.
        device: where the model computes.
    """

    def __init__(self, denoising: DenoisingStrategy, latents: LatentSource, seed: int, device: torch.device) -> None:
        self.denoising = denoising
        self.latents = latents
        self.seed = seed
        self.device = device

    def assemble(self, batch: TrainBatch, *, purpose: str = "step", timestep: float | None = None) -> StepInputs:
        """Inputs of a batch.

        Args:
            batch: what was read.
            purpose: part of every address; training and validation draw apart.
            timestep: the same noise level for all (0..1000) instead of drawn ones.
        """
        process = self.denoising.process
        latents = self.denoising.scale_latents(self.latents.get(batch)).cpu()
        size = latents.shape[-2], latents.shape[-1]
        noise = draw_noise(item_generators(self.seed, f"{purpose} noise", batch.items), latents.shape[1:])
        if timestep is None:
            generators = item_generators(self.seed, f"{purpose} time", batch.items)
            timesteps, sigmas = process.sample(generators, size, attributes.timestep_offsets(batch.attributes))
        else:
            timesteps = torch.full((batch.size,), float(timestep))
            sigmas = process.at(timesteps)
        first = batch.items[0]
        return StepInputs(
            batch=batch,
            latents=latents,
            noise=noise,
            noisy=process.mix(latents, noise, timesteps, sigmas),
            timesteps=timesteps,
            sigmas=sigmas,
            target=process.target(latents, noise, timesteps),
            weight=process.weight(timesteps, sigmas),
            module_seed=address(self.seed, "module", first.epoch, batch.ordinal),
        ).to(self.device)
