"""Where a run is."""

from dataclasses import dataclass

from library.data.loader import Window


@dataclass
class TrainState:
    """Counts what was trained on, never what was only read ahead.

    Attributes:
        max_steps: optimizer steps after which the run ends.
        step: optimizer steps taken.
        micro_step: micro-steps taken, over all ranks.
        epoch: current epoch, from 1.
        batch_in_epoch: batches of this epoch trained on, over all ranks.
    """

    max_steps: int
    step: int = 0
    micro_step: int = 0
    epoch: int = 1
    batch_in_epoch: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run has all its steps."""
        return self.step >= self.max_steps

    def advance(self, window: Window) -> None:
        """A window was trained on."""
        self.step += 1
        self.micro_step += window.count
        self.batch_in_epoch += window.count

    def next_epoch(self) -> None:
        """An epoch is complete."""
        self.epoch += 1
        self.batch_in_epoch = 0
