"""Everything random or data-dependent of a micro-step, made in one place."""

from typing import Protocol

import torch
from torch import Tensor

from library.base.randomness import address
from library.batch import StepInputs, TrainBatch
from library.data import attributes
from library.diffusion.noise import LevelDraw, NoiseRecipe, item_generators, strata
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
        recipe: what is drawn besides plain noise.
        num_strata: see `--num_timestep_buckets`; None draws every level alone.
    """

    def __init__(
        self,
        denoising: DenoisingStrategy,
        latents: LatentSource,
        seed: int,
        device: torch.device,
        recipe: NoiseRecipe | None = None,
        num_strata: int | None = None,
    ) -> None:
        self.denoising = denoising
        self.latents = latents
        self.seed = seed
        self.device = device
        self.recipe = recipe or NoiseRecipe()
        self.num_strata = num_strata

    def assemble(self, batch: TrainBatch, *, purpose: str = "step", timestep: float | None = None) -> StepInputs:
        """Inputs of a batch.

        Args:
            batch: what was read.
            purpose: part of every address; training and validation draw apart.
            timestep: the same noise level for all (0..1000) instead of drawn ones.
        """
        process = self.denoising.process
        latents = self._scaled_latents(batch)
        size = latents.shape[-2], latents.shape[-1]
        generators = item_generators(self.seed, f"{purpose} noise", batch.items)
        noise = self.recipe.draw(generators, latents)
        disturbed = self.recipe.perturbed(generators, noise)
        if timestep is None:
            draws = self._level_draws(batch, purpose)
            timesteps, sigmas = process.sample(draws, size, attributes.timestep_offsets(batch.attributes))
        else:
            timesteps = torch.full((batch.size,), float(timestep))
            sigmas = process.at(timesteps)
        first = batch.items[0]
        return StepInputs(
            batch=batch,
            latents=latents,
            noise=noise,
            noisy=process.mix(latents, disturbed, timesteps, sigmas),
            timesteps=timesteps,
            sigmas=sigmas,
            target=process.target(latents, noise, timesteps),
            weight=process.weight(timesteps, sigmas),
            module_seed=address(self.seed, "module", first.epoch, batch.ordinal),
            extra=self.denoising.extra_inputs(
                batch, item_generators(self.seed, f"{purpose} extra", batch.items), self._scaled_latents
            ),
            # what is left out of a step by chance is never left out of a validation
            draws=self.denoising.draw(item_generators(self.seed, "draws", batch.items)) if purpose == "step" else {},
        ).to(self.device)

    def _scaled_latents(self, batch: TrainBatch) -> Tensor:
        return self.denoising.scale_latents(self.latents.get(batch)).cpu()

    def _level_draws(self, batch: TrainBatch, purpose: str) -> list[LevelDraw]:
        generators = item_generators(self.seed, f"{purpose} time", batch.items)
        if self.num_strata is None:
            return [LevelDraw(generator) for generator in generators]
        first = batch.ordinal * batch.size
        chosen = strata(self.seed, batch.items[0].epoch, first, batch.size, self.num_strata)
        return [LevelDraw(generator, stratum) for generator, stratum in zip(generators, chosen)]
