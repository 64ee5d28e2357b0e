"""Learning-rate schedules as functions of (step, total), so that a resumed run with another length is well defined."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from library.base.errors import UserError
from library.options.schedule import ScheduleOptions

Curve = Callable[[float], float]

# progress after warm-up (0..1) -> factor
CURVES: dict[str, Curve] = {
    "constant": lambda _: 1.0,
    "constant_with_warmup": lambda _: 1.0,
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "cosine": lambda progress: max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
}


@dataclass(frozen=True)
class Schedule:
    """A schedule: linear warm-up, then a curve.

    Attributes:
        name: of `--lr_scheduler`.
        warmup: steps from 0 to the full rate.
        total: optimizer steps of the run.
    """

    name: str
    warmup: int
    total: int

    def factor(self, step: int) -> float:
        """What the learning rate of step `step` (from 0) is multiplied with."""
        if step < self.warmup:
            return step / self.warmup
        return CURVES[self.name]((step - self.warmup) / max(1, self.total - self.warmup))


def build_schedule(options: ScheduleOptions, total: int) -> Schedule:
    """The schedule of a run of `total` optimizer steps.

    Raises:
        UserError: unknown name, or warm-up that cannot apply.
    """
    name = options.lr_scheduler
    if name not in CURVES:
        raise UserError("--lr_scheduler", name, f"this version has {', '.join(CURVES)}")
    given = options.lr_warmup_steps or 0
    warmup = int(given * total) if isinstance(given, float) and given < 1 else int(given)
    if name == "constant" and warmup:
        raise UserError("--lr_warmup_steps", given, "--lr_scheduler constant has no warm-up; use constant_with_warmup")
    if warmup > total:
        raise UserError("--lr_warmup_steps", given, f"is longer than the run of {total} steps")
    return Schedule(name, warmup, total)
