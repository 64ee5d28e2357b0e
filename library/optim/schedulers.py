"""Learning-rate schedules as functions of (step, total), so that a resumed run with another length is well defined."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from library.base.errors import UserError, nearest, raise_problems
from library.optim.custom import CustomSchedule, build_custom
from library.options.arguments import parse_arguments
from library.options.optimizer import OptimizerOptions
from library.options.schedule import READS, ScheduleOptions

_ARGS = "--lr_scheduler_args"
_POLYNOMIAL_END = 1e-7  # rate at the end of `polynomial`
_TIMESCALE = 10_000  # of `inverse_sqrt` without warm-up
_FORMS = ("linear", "cosine", "1-sqrt")
# schedule -> what it takes in --lr_scheduler_args
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "polynomial": ("lr_end",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": ("warmup_type", "decay_type"),
    "piecewise_constant": ("step_rules",),
}


@dataclass(frozen=True)
class Shape:
    """Numbers that single curves read.

    Attributes:
        decay: steps of the final decay.
        cycles: half waves, or restarts.
        power: of `polynomial`.
        timescale: of `inverse_sqrt`, in steps; None: the warm-up, or 10000 without one.
        lowest: lowest factor.
        end: last factor of `polynomial`.
        rules: (first step of the next rule, factor) of `piecewise_constant`; the last one has no end.
        warmup_from: first factor of `cosine_warmup_with_min_lr`; None: 1 / warm-up.
        warmup_form: linear, cosine or 1-sqrt.
        decay_form: linear, cosine or 1-sqrt.
    """

    decay: int = 0
    cycles: float = 1
    power: float = 1
    timescale: int | None = None
    lowest: float = 0.0
    end: float = _POLYNOMIAL_END
    rules: tuple[tuple[float, float], ...] = ((math.inf, 1.0),)
    warmup_from: float | None = None
    warmup_form: str = "linear"
    decay_form: str = "cosine"


@dataclass(frozen=True)
class Schedule:
    """A schedule: linear warm-up from 0 (two curves have their own), then a curve.

    Attributes:
        name: of `--lr_scheduler`.
        warmup: steps from 0 to the full rate.
        total: optimizer steps of the run.
        shape: what else the curve reads.
    """

    name: str
    warmup: int
    total: int
    shape: Shape = field(default_factory=Shape)

    def factor(self, step: int) -> float:
        """What the learning rate of step `step` (from 0) is multiplied with."""
        if step < self.warmup and self.name not in _OWN_WARMUP:
            return step / self.warmup
        return CURVES[self.name](self, step)

    def progress(self, step: float) -> float:
        """Part of the steps after warm-up that lies behind: 0 to 1, above 1 beyond the end."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def _wave(halves: float, progress: float, lowest: float = 0.0) -> float:
    """From 1 to `lowest` by a cosine of so many half waves."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * halves * progress)) * (1.0 - lowest) + lowest)


def _restarts(s: Schedule, step: int) -> float:
    progress = s.progress(step)
    return 0.0 if progress >= 1.0 else _wave(1, (s.shape.cycles * progress) % 1.0)


def _polynomial(s: Schedule, step: int) -> float:
    if step > s.total:
        return s.shape.end
    return (1.0 - s.shape.end) * (1.0 - s.progress(step)) ** s.shape.power + s.shape.end


def _inverse_sqrt(s: Schedule, step: int) -> float:
    scale = s.shape.timescale or s.warmup or _TIMESCALE
    return 1.0 / math.sqrt((step + scale - s.warmup) / scale)


def _late_cosine(s: Schedule, step: int) -> float:
    """The curve of transformers' `cosine_warmup_with_min_lr`: one step ahead, no step has the rate 0."""
    if step >= s.warmup:
        return _wave(s.shape.cycles, s.progress(step + 1), s.shape.lowest)
    if s.shape.warmup_from is None:
        return (step + 1) / s.warmup
    return s.shape.warmup_from + (1.0 - s.shape.warmup_from) * step / max(1, s.warmup - 1)


def _rising(form: str, progress: float) -> float:
    if form == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return progress if form == "linear" else 1.0 - math.sqrt(1.0 - progress)


def _falling(form: str, progress: float, cycles: float) -> float:
    if form == "cosine":
        return _wave(cycles, progress)
    return 1.0 - progress if form == "linear" else 1.0 - math.sqrt(progress)


def _stable_then_decay(s: Schedule, step: int) -> float:
    lowest, begins = s.shape.lowest, s.total - s.shape.decay
    if step < s.warmup:
        return _rising(s.shape.warmup_form, step / s.warmup) * (1.0 - lowest) + lowest
    if step < begins:
        return 1.0
    if step >= s.total:
        return lowest
    return _falling(s.shape.decay_form, (step - begins) / s.shape.decay, s.shape.cycles) * (1.0 - lowest) + lowest


def _piecewise(s: Schedule, step: int) -> float:
    return next(value for end, value in s.shape.rules if step < end)


# name -> factor of a step. Formulas: those of transformers' and diffusers' schedules of the same names.
CURVES: dict[str, Callable[[Schedule, int], float]] = {
    "constant": lambda *_: 1.0,
    "constant_with_warmup": lambda *_: 1.0,
    "adafactor": lambda *_: 1.0,
    "linear": lambda s, step: max(0.0, 1.0 - s.progress(step)),
    "cosine": lambda s, step: _wave(s.shape.cycles, s.progress(step)),
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": lambda s, step: _wave(s.shape.cycles, s.progress(step), s.shape.lowest),
    "cosine_warmup_with_min_lr": _late_cosine,
    "warmup_stable_decay": _stable_then_decay,
    "piecewise_constant": _piecewise,
}
_OWN_WARMUP = {"cosine_warmup_with_min_lr", "warmup_stable_decay", "piecewise_constant"}


def build_schedule(
    options: ScheduleOptions, total: int, optimizer: OptimizerOptions | None = None
) -> Schedule | CustomSchedule:
    """The schedule of a run of `total` optimizer steps.

    Args:
        options: of the schedule.
        total: optimizer steps.
        optimizer: of the run; some follow no schedule. None: one that does, with a rate of 1.

    Raises:
        UserError: unknown name, arguments it does not take, or warm-up that cannot apply.
    """
    raise_problems(options.problems())
    rate = 1.0
    if optimizer is not None:
        rate = optimizer.learning_rate
        if optimizer.sets_own_rate and options.lr_warmup_steps:
            message = (
                "Adafactor works out its own rate: warmup_init=True in --optimizer_args is its warm-up, or set "
                "relative_step=False"
            )
            raise UserError("--lr_warmup_steps", options.lr_warmup_steps, message)
        if optimizer.sets_own_rate or optimizer.is_schedule_free:
            return Schedule("constant", 0, total)
    if options.lr_scheduler_type:
        return build_custom(options)
    if options.name == "adafactor":
        message = "needs --optimizer_type Adafactor with relative_step=True in --optimizer_args"
        raise UserError("--lr_scheduler", options.lr_scheduler, message)
    read = READS[options.name]
    warmup = _steps(options.lr_warmup_steps, total)
    if options.name == "constant" and warmup:
        message = "--lr_scheduler constant has no warm-up; use constant_with_warmup"
        raise UserError("--lr_warmup_steps", options.lr_warmup_steps, message)
    warmup = warmup if "lr_warmup_steps" in read else 0
    decay = _steps(options.lr_decay_steps, total) if "lr_decay_steps" in read else 0
    if warmup > total:
        raise UserError("--lr_warmup_steps", options.lr_warmup_steps, f"is longer than the run of {total} steps")
    if warmup + decay > total:
        message = f"warm-up and decay together are longer than the run of {total} steps"
        raise UserError("--lr_decay_steps", options.lr_decay_steps, message)
    return Schedule(options.name, warmup, total, _shape(options, decay, rate))


def _steps(given: int | float, total: int) -> int:
    """A count, or a share of all steps."""
    return int(given * total) if isinstance(given, float) and given < 1 else int(given)


def _shape(options: ScheduleOptions, decay: int, rate: float) -> Shape:
    """What the curve reads of flags and arguments.

    Args:
        options: of the schedule.
        decay: steps of the final decay.
        rate: the learning rate, which rates among the arguments are compared with.
    """
    name = options.name
    arguments = parse_arguments(options.lr_scheduler_args, _ARGS) if "lr_scheduler_args" in READS[name] else {}
    for key in arguments:
        if key not in ARGUMENTS[name]:
            guess = nearest(key, ARGUMENTS[name])
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(_ARGS, key, f"--lr_scheduler {name} takes {', '.join(ARGUMENTS[name])}{hint}")
    for key in arguments.keys() - {"step_rules", "warmup_type", "decay_type"}:
        _number(arguments, key)
    cycles: float = options.lr_scheduler_num_cycles
    if name == "cosine":
        cycles = 2 * arguments.get("num_cycles", 0.5)
    return Shape(
        decay=decay,
        cycles=cycles,
        power=options.lr_scheduler_power,
        timescale=options.lr_scheduler_timescale,
        lowest=_lowest(options, arguments, rate),
        end=_end(arguments, rate) if name == "polynomial" else _POLYNOMIAL_END,
        rules=_rules(arguments) if name == "piecewise_constant" else ((math.inf, 1.0),),
        warmup_from=arguments.get("warmup_lr_rate"),
        warmup_form=_form(arguments, "warmup_type", "linear"),
        decay_form=_form(arguments, "decay_type", "cosine"),
    )


def _number(arguments: Mapping[str, Any], key: str) -> None:
    value = arguments[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(_ARGS, f"{key}={value}", "expected a number of at least 0")


def _form(arguments: Mapping[str, Any], key: str, default: str) -> str:
    form = arguments.get(key, default)
    if form not in _FORMS:
        raise UserError(_ARGS, f"{key}={form}", f"expected one of {', '.join(map(repr, _FORMS))}")
    return form


def _share_of_rate(arguments: Mapping[str, Any], key: str, rate: float) -> float:
    """A rate among the arguments as a factor."""
    if arguments[key] > rate or rate == 0:
        raise UserError(_ARGS, f"{key}={arguments[key]}", f"is above --learning_rate {rate:g}")
    return arguments[key] / rate


def _end(arguments: Mapping[str, Any], rate: float) -> float:
    if "lr_end" in arguments:
        return _share_of_rate(arguments, "lr_end", rate)
    # rates below this end are of no use; then the curve ends at 0
    return _POLYNOMIAL_END / rate if rate > _POLYNOMIAL_END else 0.0


def _lowest(options: ScheduleOptions, arguments: Mapping[str, Any], rate: float) -> float:
    """The lowest factor; two curves have no meaning without one."""
    if "lr_scheduler_min_lr_ratio" not in READS[options.name]:
        return 0.0
    found = {}
    if options.lr_scheduler_min_lr_ratio is not None:
        found["--lr_scheduler_min_lr_ratio"] = options.lr_scheduler_min_lr_ratio
    if "min_lr_rate" in arguments:
        found["min_lr_rate"] = arguments["min_lr_rate"]
    if "min_lr" in arguments:
        found["min_lr"] = _share_of_rate(arguments, "min_lr", rate)
    if len(found) > 1:
        raise UserError(_ARGS, options.lr_scheduler_args, f"{' and '.join(found)} say the same; give one of them")
    if not found and options.name != "warmup_stable_decay":
        message = f"needs --lr_scheduler_min_lr_ratio, or min_lr or min_lr_rate in {_ARGS}"
        raise UserError("--lr_scheduler", options.lr_scheduler, message)
    lowest = next(iter(found.values()), 0.0)
    if lowest > 1:
        raise UserError(_ARGS, f"min_lr_rate={lowest}", "must be between 0 and 1")
    return lowest


def _rules(arguments: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    """`"1:10,0.1:20,0.005"`: factor 1 before step 10, 0.1 before step 20, then 0.005."""
    text = arguments.get("step_rules")
    example = "step_rules='1:10,0.1:20,0.005' (factor 1 before step 10, 0.1 before step 20, then 0.005)"
    if text is None:
        raise UserError("--lr_scheduler", "piecewise_constant", f"needs {_ARGS} {example}")
    try:
        *parts, last = str(text).split(",")
        rules = [(int(end), float(value)) for value, end in (part.split(":") for part in parts)]
        final = float(last)
    except ValueError as error:
        raise UserError(_ARGS, f"step_rules={text!r}", f"expected e.g. {example}") from error
    return (*sorted(rules), (math.inf, final))


_LOOKED_AT = 20_000  # steps of which every one is looked at for the highest rate


def rate_courses(
    schedule: Schedule | CustomSchedule, optimizer: OptimizerOptions, rates: Mapping[str, float], total: int
) -> list[tuple[str, str]]:
    """How learning rates run from the first step to the last, as (what, text) lines.

    Args:
        schedule: of the run.
        optimizer: of the run.
        rates: full rates by what they belong to; equal ones become one line, "all parts" when there is no other.
        total: optimizer steps.
    """
    if optimizer.sets_own_rate:
        return [("all parts", "worked out by Adafactor")]
    parts: dict[float, list[str]] = {}
    for name, rate in rates.items():
        parts.setdefault(rate, []).append(name)
    extra = ", times the size of steps that the optimizer finds" if optimizer.finds_rate else ""
    lines = []
    for rate, names in parts.items():
        part = ", ".join(names) if len(parts) > 1 else "all parts"
        if isinstance(schedule, CustomSchedule) and total > _LOOKED_AT:
            lines.append((part, f"{_short(rate)} at first, then as {schedule.name} says{extra}"))
            continue
        values = [rate * factor for factor in _factors(schedule, rate, total)]
        first, peak, last = (_short(value) for value in (values[0], max(values), values[-1]))
        text = first if first == peak == last else f"{first} at first, {peak} at most, {last} at the end"
        lines.append((part, text + extra))
    return lines


def _factors(schedule: Schedule | CustomSchedule, rate: float, total: int) -> list[float]:
    """Factors of the first step, some or all in between, and the last."""
    if isinstance(schedule, Schedule):
        stride = max(1, total // _LOOKED_AT)
        steps = sorted({*range(0, total, stride), min(schedule.warmup, total - 1), max(0, total - 1)})
        return [schedule.factor(step) for step in steps]
    attached = schedule.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9))
    factors = []
    for _ in range(max(1, total)):
        factors.append(attached.rates[0] / (rate or 1.0))
        attached.step()
    return factors


def _short(rate: float) -> str:
    """Three digits: 0.5, 1e-4, 2.53e-6."""
    if rate == 0 or rate >= 0.01:
        return f"{rate:.3g}"
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
