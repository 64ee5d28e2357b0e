"""The trained weights as others see them: what samples, validation and saved files show."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.base.logs import logger
from library.optim.driver import OptimizerDriver
from library.optim.ema import AveragedWeights
from library.options.ema import EmaOptions
from library.training.tasks.base import TrainingTask


class TrainedWeights:
    """Shows the weights of a task, or their average.

    Args:
        task: what is trained.
        optimizer: its optimizer, which may train on other weights than it shows.
        average: of the weights, or None.
        samples: what samples and validation look at: trained, ema, both.
    """

    def __init__(
        self, task: TrainingTask, optimizer: OptimizerDriver, average: AveragedWeights | None, samples: str = "trained"
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.average = average
        both = ("trained", "ema")
        self.looked_at = both if average and samples == "both" else (samples if average else "trained",)

    @classmethod
    def of_run(
        cls, task: TrainingTask, optimizer: OptimizerDriver, options: EmaOptions, device: torch.device
    ) -> "TrainedWeights":
        """With an average if `--ema_decay` asks for one."""
        average = None
        if options.ema_decay is not None:
            average = AveragedWeights(
                optimizer.parameters,
                decay=options.ema_decay,
                device=torch.device("cpu") if options.ema_device == "cpu" else device,
                warmup=not options.ema_no_warmup,
            )
        return cls(task, optimizer, average, options.ema_samples)

    @contextmanager
    def shown(self, kind: str = "trained") -> Iterator[None]:
        """Dropouts rest, and the model holds the weights of a kind: `trained`, or `ema` for their average."""
        with self.task.evaluating(), self.optimizer.evaluating():
            if kind == "trained" or self.average is None:
                yield
                return
            with self.average.applied():
                yield

    def updated(self) -> None:
        """An optimizer step was taken."""
        if self.average is not None:
            self.average.update()

    def state(self) -> dict[str, object] | None:
        """Of the average, for a training state."""
        return None if self.average is None else self.average.state()

    def restore(self, state: dict[str, object] | None) -> None:
        """Take up the average of a state; without one it begins at the weights of now."""
        if self.average is None:
            if state is not None:
                logger.warning("the state holds averaged weights; without --ema_decay they are left behind")
            return
        if state is None:
            logger.warning("the state holds no averaged weights: --ema_decay begins at the weights of now")
            self.average.restart()
        else:
            self.average.load_state(state)
