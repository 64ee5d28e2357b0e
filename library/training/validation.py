"""Loss on images that are never trained on, always with the same noise and noise levels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

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
    def run(self) -> float:
        """Mean loss over all held-out images and fixed noise levels."""
        mine = self.specs[self.processes.rank :: self.processes.world_size]
        total = torch.zeros(2, dtype=torch.float64)
        for spec in mine:
            batch = self.dataset[spec]
            # regularization weights have no place here
            batch = replace(batch, loss_weights=torch.ones(batch.size))
            for timestep in self.timesteps:
                inputs = self.assembler.assemble(batch, purpose="validation", timestep=timestep)
                values = self.losses(inputs)
                total += torch.tensor([float(values.double().sum()), batch.size], dtype=torch.float64)
        total = self.processes.sum_values(total.float().to(self.processes.device))
        return float(total[0] / total[1])
