"""Optimizers by the names of `--optimizer_type`."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.base.errors import UserError, nearest
from library.base.lazy import optional_import
from library.options.optimizer import OptimizerOptions


@dataclass(frozen=True)
class _Entry:
    name: str
    module: str
    attribute: str
    install: str


_ENTRIES = (
    _Entry("AdamW", "torch.optim", "AdamW", "torch"),
    _Entry("AdamW8bit", "bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    _Entry("Adafactor", "transformers.optimization", "Adafactor", "transformers"),
)
OPTIMIZERS: Mapping[str, _Entry] = {entry.name.lower(): entry for entry in _ENTRIES}


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and what is told about it.

    Attributes:
        optimizer: the optimizer.
        description: `module.Class(k=v,...)`, as metadata shows it.
        relative_step: whether it sets its own learning rate (Adafactor).
        given: names of the arguments that the user gave.
    """

    optimizer: torch.optim.Optimizer
    description: str
    relative_step: bool = False
    given: frozenset[str] = frozenset()


def optimizer_name(options: OptimizerOptions) -> str:
    """The optimizer's name in lower case, old aliases resolved."""
    if options.use_8bit_adam:
        return "adamw8bit"
    if options.use_lion_optimizer:
        return "lion"
    return (options.optimizer_type or "AdamW").lower()


def parse_arguments(pairs: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """`["betas=0.9,0.99", "weight_decay=0.1"]` as keyword arguments, values read as Python literals.

    Raises:
        UserError: an entry without `=` or a value that is no literal.
    """
    arguments: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(flag, pair, "expected name=value")
        try:
            arguments[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(
                flag, pair, "the value must be a Python literal; text needs quotes, e.g. name='text'"
            ) from error
    return arguments


def build_optimizer(options: OptimizerOptions, groups: Iterable[Mapping[str, Any]]) -> BuiltOptimizer:
    """The optimizer of a run over the given parameter groups.

    Raises:
        UserError: unknown name, missing package, or arguments the optimizer does not take.
    """
    entry = OPTIMIZERS.get(optimizer_name(options))
    if entry is None:
        guess = nearest(options.optimizer_type or "", [e.name for e in _ENTRIES])
        known = ", ".join(e.name for e in _ENTRIES)
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError("--optimizer_type", options.optimizer_type, f"this version has {known}{hint}")
    module = optional_import(entry.module, needed_for=f"--optimizer_type {entry.name}", install=entry.install)
    arguments = parse_arguments(options.optimizer_args, "--optimizer_args")
    groups = [dict(group) for group in groups]
    relative = entry.name == "Adafactor" and arguments.setdefault("relative_step", True)
    learning_rate: float | None = options.learning_rate
    if relative:
        learning_rate = None
        for group in groups:
            group.pop("lr", None)
    elif entry.name == "Adafactor" and arguments.get("warmup_init"):
        raise UserError("--optimizer_args", "warmup_init=True", "needs relative_step=True")
    optimizer_class = getattr(module, entry.attribute)
    try:
        optimizer = optimizer_class(groups, lr=learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            "--optimizer_args", options.optimizer_args, f"{entry.name} does not take these: {error}"
        ) from error
    given = parse_arguments(options.optimizer_args, "--optimizer_args")
    text = ",".join(f"{key}={value}" for key, value in given.items())
    description = f"{optimizer_class.__module__}.{optimizer_class.__name__}" + (f"({text})" if text else "")
    return BuiltOptimizer(optimizer, description, bool(relative), frozenset(given))
