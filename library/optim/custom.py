"""Schedule classes that the user names: they keep a state of their own."""

import importlib
import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError, nearest
from library.options.arguments import parse_arguments
from library.options.schedule import ScheduleOptions

_TYPE, _ARGS = "--lr_scheduler_type", "--lr_scheduler_args"


@dataclass(frozen=True)
class CustomSchedule:
    """A schedule class and its arguments.

    Attributes:
        name: as the user wrote it.
        scheduler_class: called as `scheduler_class(optimizer, **arguments)`.
        arguments: of the class.
    """

    name: str
    scheduler_class: type
    arguments: dict[str, Any] = field(default_factory=dict)

    def attach(self, optimizer: torch.optim.Optimizer) -> "AttachedSchedule":
        """Let it set the rates of an optimizer.

        Raises:
            UserError: arguments that the class does not take, or one whose state cannot be saved.
        """
        try:
            scheduler = self.scheduler_class(optimizer, **self.arguments)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise UserError(_ARGS, self.arguments, f"{self.name} does not take these: {error}") from error
        return AttachedSchedule(self.name, scheduler, optimizer)


def build_custom(options: ScheduleOptions) -> CustomSchedule:
    """The class of `--lr_scheduler_type`, tried on an optimizer of one number.

    Raises:
        UserError: no such class, or arguments it does not take.
    """
    name = options.lr_scheduler_type
    module, _, attribute = name.rpartition(".")
    arguments = parse_arguments(options.lr_scheduler_args, _ARGS)
    custom = CustomSchedule(name, _find(name, module or "torch.optim.lr_scheduler", attribute), arguments)
    trial = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    attached = custom.attach(trial)
    try:
        attached.step()
        unfit = _not_plain(attached.state())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(_TYPE, name, f"cannot be stepped without further values: {error}") from error
    if unfit:
        raise UserError(_TYPE, name, f"its state holds a {unfit}, which a training state cannot hold")
    return custom


def _find(name: str, module: str, attribute: str) -> type:
    try:
        place = importlib.import_module(module)
    except ImportError as error:
        message = f"{module} cannot be imported ({error}); install the package that has it, or correct the name"
        raise UserError(_TYPE, name, message) from error
    found = getattr(place, attribute, None)
    if not (inspect.isclass(found) and callable(getattr(found, "step", None))):
        classes = [n for n, value in vars(place).items() if inspect.isclass(value) and hasattr(value, "step")]
        guess = nearest(attribute, classes)
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError(_TYPE, name, f"{module} has no such schedule class{hint}")
    return found


def _not_plain(value: Any) -> str | None:
    """Name of the first type inside that a training state cannot hold; None when it can hold all."""
    if isinstance(value, dict):
        return next((unfit for one in value.values() if (unfit := _not_plain(one))), None)
    if isinstance(value, list | tuple):
        return next((unfit for one in value if (unfit := _not_plain(one))), None)
    plain = value is None or isinstance(value, bool | int | float | str | Tensor) or hasattr(value, "item")
    return None if plain else type(value).__name__


class AttachedSchedule:
    """A schedule at work on an optimizer.

    The class reads and writes the rates of the optimizer's groups. They are kept here as it left them, so that the
    driver may scale what the optimizer sees.

    Attributes:
        rates: of every group, as the class set them.
        bases: rates that the class began with.
        count: steps it has taken.
    """

    def __init__(self, name: str, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        self.name = name
        self.scheduler = scheduler
        self.optimizer = optimizer
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.count = 0

    def step(self) -> None:
        """One optimizer step was taken."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate
        with warnings.catch_warnings():
            # it is stepped ahead without the optimizer where a run begins later; torch warns of that
            warnings.simplefilter("ignore")
            self.scheduler.step()
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.count += 1

    def go_to(self, step: int) -> None:
        """Stand after `step` steps.

        Raises:
            UserError: it is further already.
        """
        if step < self.count:
            raise UserError(_TYPE, self.name, f"cannot go back from step {self.count} to {step}")
        while self.count < step:
            self.step()

    def state(self) -> dict[str, Any]:
        """What has to be known to go on."""
        return {
            "name": self.name,
            "scheduler": self.scheduler.state_dict(),
            "rates": self.rates,
            "bases": self.bases,
            "count": self.count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same class."""
        self.scheduler.load_state_dict(state["scheduler"])
        self.rates, self.bases, self.count = list(state["rates"]), list(state["bases"]), state["count"]
