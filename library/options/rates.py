"""What optimizer and schedule say of each other: options that one of them leaves without effect, and advice."""

from collections.abc import Iterator
from typing import Any

from library.options.arguments import parse_arguments
from library.options.optimizer import OptimizerOptions
from library.options.schedule import READS, SCHEDULE_FLAGS, ScheduleOptions
from library.options.schema import OptionSet

_RATES = ("learning_rate", "unet_lr", "text_encoder_lr")
_MANUAL = "set relative_step=False in --optimizer_args to choose it yourself"


def rewritten_rates(options: OptionSet) -> dict[str, Any]:
    """Option values as saved metadata show them, where Adafactor works out its own rate; else nothing."""
    optimizer = options[OptimizerOptions]
    if not optimizer.sets_own_rate:
        return {}
    return {**dict.fromkeys(_RATES), "lr_scheduler": f"adafactor:{optimizer.learning_rate}"}


def rate_warnings(options: OptionSet) -> Iterator[str]:
    """A sentence for each option about the learning rate that does nothing in this run, or that is not advisable."""
    optimizer, schedule = options[OptimizerOptions], options[ScheduleOptions]
    if any(True for _ in optimizer.problems()) or any(True for _ in schedule.problems()):
        return  # errors come first
    yield from _optimizer_warnings(options, optimizer, schedule)
    yield from _schedule_warnings(options, optimizer, schedule)


def _optimizer_warnings(options: OptionSet, optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterator[str]:
    values = options.values()
    rate = optimizer.learning_rate if values.get("unet_lr") is None else values["unet_lr"]
    if optimizer.finds_rate and rate <= 0.1:
        yield (
            f"a learning rate of {rate:g} is very low for {optimizer.shown_name}: it finds the size of its steps and "
            "multiplies it with the rate; 1.0 is recommended"
        )
    if optimizer.fused_backward_pass and optimizer.max_grad_norm:
        yield (
            f"--max_grad_norm {optimizer.max_grad_norm:g} has no effect with --fused_backward_pass: weights are "
            "updated before the length of the whole gradient is known; --max_grad_norm 0 says the same"
        )
    if optimizer.fused_backward_pass and any("ggpo_" in text for text in values.get("network_args") or ()):
        yield "the ggpo_ arguments of the network see no gradients with --fused_backward_pass: their norms stay 0"
    if optimizer.name == "adafactor":
        yield from _adafactor_warnings(options, optimizer, schedule)


def _adafactor_warnings(options: OptionSet, optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterator[str]:
    arguments = parse_arguments(optimizer.optimizer_args, "--optimizer_args")
    if optimizer.sets_own_rate:
        if not arguments.get("relative_step", True):
            yield "relative_step=False has no effect beside warmup_init=True, which needs relative_step=True"
        values, changed = options.values(), options.changed()
        given = [f"--{name}" for name in _RATES if name in changed and values[name] not in (None, 0, [])]
        if given:
            verb = "have" if len(given) > 1 else "has"
            yield f"{', '.join(given)} {verb} no effect: Adafactor works out its own rate; {_MANUAL}"
        return
    if optimizer.max_grad_norm and not optimizer.fused_backward_pass:
        yield (
            f"--max_grad_norm {optimizer.max_grad_norm:g} clips gradients whose updates Adafactor limits anyway; "
            "--max_grad_norm 0 is recommended"
        )
    if schedule.lr_scheduler_type or schedule.name != "constant_with_warmup":
        yield "--lr_scheduler constant_with_warmup is recommended for Adafactor with relative_step=False"
    if arguments.get("clip_threshold", 1.0) != 1.0:
        yield "clip_threshold=1.0 is recommended for Adafactor with relative_step=False"


def _schedule_warnings(options: OptionSet, optimizer: OptimizerOptions, schedule: ScheduleOptions) -> Iterator[str]:
    changed = options.changed()
    given = [name for name in ("lr_scheduler", "lr_scheduler_type", *SCHEDULE_FLAGS) if name in changed]
    if optimizer.is_schedule_free or optimizer.sets_own_rate:
        if schedule.name in ("constant", "adafactor"):
            given = [name for name in given if name != "lr_scheduler"]
        for name in given:
            yield f"--{name} has no effect: {_own_course(optimizer)}"
    elif schedule.lr_scheduler_type:
        for name in given:
            if name not in ("lr_scheduler_type", "lr_scheduler_args"):
                yield f"--{name} has no effect with --lr_scheduler_type"
    else:
        # a warm-up of `constant` is refused
        read = {*READS[schedule.name], "lr_scheduler", *(["lr_warmup_steps"] if schedule.name == "constant" else [])}
        for name in given:
            if name not in read:
                yield f"--{name} has no effect with --lr_scheduler {schedule.lr_scheduler}"


def _own_course(optimizer: OptimizerOptions) -> str:
    if optimizer.sets_own_rate:
        return f"Adafactor works out its own rate; {_MANUAL}"
    own = "" if optimizer.name.startswith("radam") else "; warmup_steps=N in --optimizer_args is its own warm-up"
    return f"{optimizer.shown_name} needs no schedule{own}"
