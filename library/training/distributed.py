"""Processes, devices and the sum of gradients over ranks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from library.base.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.accelerator.is_main_process

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all ranks; a rank without one contributes zero."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        flat = _flatten_dense_tensors(gradients)
        torch.distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients)):
            gradient.copy_(summed)

    def sum_values(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all ranks."""
        return values if self.world_size == 1 else self.accelerator.reduce(values, "sum")

    def wait_for_all(self) -> None:
        """Until every process is here, however long that takes: the usual limit of some minutes does not hold."""
        if self.world_size > 1:
            torch.distributed.barrier(_patient_group())

    def broadcast(self, parameters: Sequence[Tensor]) -> None:
        """Give every rank the values of rank 0."""
        if self.world_size > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)


@cache
def _patient_group() -> torch.distributed.ProcessGroup:
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def process_is_alive(number: int) -> bool:
    """Whether a process of this machine has this id."""
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def start_processes(
    mixed_precision: str,
    log_with: Sequence[str] = (),
    logging_dir: str | None = None,
    *,
    timeout: int | None = None,
) -> Processes:
    """The accelerator of this process, as `accelerate launch` describes it.

    Args:
        mixed_precision: of the run.
        log_with: names of trackers.
        logging_dir: folder of this run's logs.
        timeout: minutes that processes wait for each other; torch's own limit when None.

    Raises:
        UserError: the device has no such precision.
    """
    patience = [] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))]
    # autocast and loss scaling are ours, so several runs of one process may differ in precision
    accelerator = Accelerator(
        mixed_precision="no", log_with=list(log_with) or None, project_dir=logging_dir, kwargs_handlers=patience
    )
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision", "fp16", "the CPU cannot train in fp16; use bf16 or no")
    return Processes(accelerator)
