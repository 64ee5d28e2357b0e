"""Loss on images that are never trained on, always with the same noise and noise levels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.batch import StepInputs
from library.data.dataset import TrainDataset
from library.data.order import BatchSpec, validation_batches
from library.diffusion.process import fixed_timesteps
from library.options.validation import ValidationOptions
from library.training.distributed import Processes
from library.training.inputs import StepAssembler
from library.training.state import TrainState

NUM_TIMESTEPS = 4


@dataclass(frozen=True)
class ValidationLosses:
    """What a validation found.

    Attributes:
        loss: mean over all images and noise levels.
        by_timestep: mean at each noise level, 0..1000.
        by_dataset: mean of each dataset that has held-out images.
    """

    loss: float
    by_timestep: Mapping[int, float]
    by_dataset: Mapping[int, float]


class Validator:
    """Runs validation.

    Args:
        options: when, and how much.
        dataset: held-out images.
        assembler: makes inputs, with the validation seed.
        losses: per-sample losses of inputs.
        processes: validation batches are shared out over ranks.
        limits: range of the noise levels, 0..1000.
    """

    def __init__(
        self,
        options: ValidationOptions,
        dataset: TrainDataset,
        assembler: StepAssembler,
        losses: Callable[[StepInputs], Tensor],
        processes: Processes,
        limits: tuple[int, int],
    ) -> None:
        self.options = options
        self.dataset = dataset
        self.assembler = assembler
        self.losses = losses
        self.processes = processes
        self.timesteps: Sequence[int] = fixed_timesteps(*limits, NUM_TIMESTEPS)
        batches = validation_batches([images.ordered() for images in dataset.sets])
        limit = options.max_validation_steps
        self.specs = [BatchSpec(items, n) for n, items in enumerate(batches[: limit or len(batches)])]

    def due_at_step(self, state: TrainState) -> bool:
        """Whether to validate after this step."""
        every = self.options.validate_every_n_steps
        return bool(every) and state.step % every == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """Whether to validate after this epoch; every epoch unless steps were asked for."""
        if self.options.validate_every_n_steps and not self.options.validate_every_n_epochs:
            return False
        return epoch % (self.options.validate_every_n_epochs or 1) == 0

    @torch.no_grad()
    def run(self) -> ValidationLosses:
        """Losses of all held-out images at fixed noise levels; every process gets the same."""
        mine = self.specs[self.processes.rank :: self.processes.world_size]
        # sums of losses and their count, by dataset and noise level
        total = torch.zeros(2, len(self.dataset.sets), len(self.timesteps), dtype=torch.float64)
        for spec in mine:
            batch = self.dataset[spec]
            # regularization weights have no place here
            batch = replace(batch, loss_weights=torch.ones(batch.size))
            for level, timestep in enumerate(self.timesteps):
                inputs = self.assembler.assemble(batch, purpose="validation", timestep=timestep)
                values = self.losses(inputs)
                total[0, batch.items[0].dataset, level] += float(values.double().sum())
                total[1, batch.items[0].dataset, level] += batch.size
        losses, counts = self.processes.sum_values(total.float().to(self.processes.device)).cpu().double()
        levels, sets = losses.sum(0) / counts.sum(0), losses.sum(1) / counts.sum(1)
        return ValidationLosses(
            float(losses.sum() / counts.sum()),
            {timestep: float(loss) for timestep, loss in zip(self.timesteps, levels)},
            {number: float(loss) for number, loss in enumerate(sets) if counts[number].sum()},
        )
