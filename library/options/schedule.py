"""Options about the length of training and the learning rate over it."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem, nearest
from library.options.arguments import argument_problems
from library.options.ranges import above, at_least, share
from library.options.schema import option

_WARMUP = "lr_warmup_steps"
# schedule -> the flags that it reads
READS: dict[str, frozenset[str]] = {
    "constant": frozenset(),
    "constant_with_warmup": frozenset({_WARMUP}),
    "linear": frozenset({_WARMUP}),
    "cosine": frozenset({_WARMUP, "lr_scheduler_args"}),
    "cosine_with_restarts": frozenset({_WARMUP, "lr_scheduler_num_cycles"}),
    "polynomial": frozenset({_WARMUP, "lr_scheduler_power", "lr_scheduler_args"}),
    "inverse_sqrt": frozenset({_WARMUP, "lr_scheduler_timescale"}),
    "cosine_with_min_lr": frozenset(
        {_WARMUP, "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio", "lr_scheduler_args"}
    ),
    "cosine_warmup_with_min_lr": frozenset(
        {_WARMUP, "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio", "lr_scheduler_args"}
    ),
    "warmup_stable_decay": frozenset(
        {_WARMUP, "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio", "lr_scheduler_args"}
    ),
    "piecewise_constant": frozenset({"lr_scheduler_args"}),
    "adafactor": frozenset(),
}
# flags that some schedules read and others do not
SCHEDULE_FLAGS = (
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
    "lr_scheduler_args",
)
_NO_PLATEAU = (
    "is refused: the loss of a step depends mostly on its noise level, so a rate that follows it falls by chance "
    "(and a resumed run or another number of processes would need the same losses); cosine_with_min_lr or "
    "warmup_stable_decay lower the rate on a plan"
)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning-rate schedule: how the rate changes while training."""

    lr_scheduler: str = option("constant", help="name of the schedule")
    lr_scheduler_type: str = option(
        "", help="a schedule class instead: a name of torch.optim.lr_scheduler, or package.module.ClassName"
    )
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
        yield from above(0, lr_scheduler_timescale=self.lr_scheduler_timescale)
        yield from argument_problems(self.lr_scheduler_args, "--lr_scheduler_args")
        yield from self._name_problems()

    def _name_problems(self) -> Iterator[Problem]:
        if self.lr_scheduler_type:
            if self.lr_scheduler_type.rpartition(".")[2] == "ReduceLROnPlateau":
                yield Problem("--lr_scheduler_type", _NO_PLATEAU, self.lr_scheduler_type)
            if self.lr_warmup_steps:
                message = "cannot be combined with --lr_scheduler_type: the class itself says how it begins"
                yield Problem("--lr_warmup_steps", message, self.lr_warmup_steps)
        elif self.lr_scheduler == "reduce_lr_on_plateau":
            yield Problem("--lr_scheduler", _NO_PLATEAU, self.lr_scheduler)
        elif self.name not in READS:
            guess = nearest(self.name, list(READS))
            hint = f"; did you mean {guess}?" if guess else ""
            yield Problem("--lr_scheduler", f"unknown; known are {', '.join(READS)}{hint}", self.lr_scheduler)
        elif self.name != self.lr_scheduler:
            try:
                float(self.lr_scheduler.partition(":")[2])
            except ValueError:
                yield Problem("--lr_scheduler", "expected adafactor or adafactor:RATE", self.lr_scheduler)

    @property
    def name(self) -> str:
        """The schedule's name; `adafactor:0.001` is `adafactor`."""
        return "adafactor" if self.lr_scheduler.startswith("adafactor:") else self.lr_scheduler


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
