"""Options about the length of training and the learning rate over it."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, share
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning-rate schedule: how the rate changes while training."""

    lr_scheduler: str = option("constant", help="name of the schedule")
    lr_scheduler_type: str = option("", help="your own schedule class, as package.module.ClassName")
    lr_scheduler_args: list[str] | None = option(None, help="key=value arguments of the schedule")
    lr_warmup_steps: int | float = option(0, help="steps until the full rate; below 1 or with %: a share of all steps")
    lr_decay_steps: int | float = option(0, help="steps of the final decay; below 1 or with %: a share of all steps")
    lr_scheduler_num_cycles: int = option(1, help="restarts of cosine_with_restarts")
    lr_scheduler_power: float = option(1, help="exponent of the polynomial schedule")
    lr_scheduler_timescale: int | None = option(None, help="time scale of inverse_sqrt; the warm-up when not given")
    lr_scheduler_min_lr_ratio: float | None = option(None, help="lowest rate as a share of the full one")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, lr_warmup_steps=self.lr_warmup_steps, lr_decay_steps=self.lr_decay_steps)
        yield from at_least(1, lr_scheduler_num_cycles=self.lr_scheduler_num_cycles)
        yield from share(lr_scheduler_min_lr_ratio=self.lr_scheduler_min_lr_ratio)
        for text in self.lr_scheduler_args or ():
            if "=" not in text:
                yield Problem("--lr_scheduler_args", "expected key=value", text)


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Length: when training ends, and what makes it repeatable."""

    max_train_steps: int = option(1600, help="optimizer steps to train")
    max_train_epochs: int | None = option(None, help="epochs to train; wins over --max_train_steps")
    gradient_accumulation_steps: int = option(1, help="batches per optimizer step")
    seed: int | None = option(None, help="number that everything random follows from; drawn when not given")
    initial_epoch: int | None = option(None, help="count epochs from this one, 1 is the first")
    initial_step: int | None = option(None, help="count steps from this one; wins over --initial_epoch")
    skip_until_initial_step: bool = option(False, help="do not train on the data before the first step")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1,
            max_train_steps=self.max_train_steps,
            max_train_epochs=self.max_train_epochs,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            initial_epoch=self.initial_epoch,
        )
        yield from at_least(0, initial_step=self.initial_step)
