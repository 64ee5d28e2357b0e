"""Optimizers by the names of `--optimizer_type`."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from library.base.errors import UserError, nearest
from library.base.lazy import optional_import
from library.base.logs import logger
from library.options.arguments import parse_arguments
from library.options.optimizer import OptimizerOptions

_TYPE, _ARGS = "--optimizer_type", "--optimizer_args"


@dataclass(frozen=True)
class _Entry:
    """A name of ours.

    Attributes:
        name: as documented; compared in lower case.
        module: where the class is.
        attribute: the class.
        install: argument of `pip install` that brings it.
        fixed: arguments that make it what its name says.
        defaults: arguments that are used when the user gives none.
        note: what a user would not expect; said once.
    """

    name: str
    module: str
    attribute: str
    install: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def _same(module: str, install: str, *names: str) -> list[_Entry]:
    return [_Entry(name, module, name, install) for name in names]


_BNB = ("bitsandbytes.optim", "bitsandbytes")
_DADAPT, _EARLIER = ("dadaptation", "dadaptation"), ("dadaptation.experimental", "dadaptation")
_NESTEROV = {"fixed": {"nesterov": True}, "defaults": {"momentum": 0.9}}
_ENTRIES = (
    *_same("torch.optim", "torch", "AdamW"),
    *_same("lion_pytorch", "lion-pytorch", "Lion"),
    *_same(*_BNB, "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "PagedAdamW", "PagedAdamW32bit"),
    _Entry(
        "SGDNesterov8bit", _BNB[0], "SGD8bit", _BNB[1], **_NESTEROV, note="bitsandbytes takes nesterov and ignores it"
    ),
    _Entry("SGDNesterov", "torch.optim", "SGD", "torch", **_NESTEROV),
    _Entry("DAdaptation", _EARLIER[0], "DAdaptAdamPreprint", _EARLIER[1]),
    *_same(*_EARLIER, "DAdaptAdamPreprint", "DAdaptAdanIP"),
    *_same(*_DADAPT, "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"),
    *_same("prodigyopt", "prodigyopt", "Prodigy"),
    *_same("transformers.optimization", "transformers", "Adafactor"),
    *_same("schedulefree", "schedulefree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
)
OPTIMIZERS: Mapping[str, _Entry] = {entry.name.lower(): entry for entry in _ENTRIES}
# packages whose name differs from that of their module
_INSTALL = {"prodigyplus": "prodigy-plus-schedule-free", "lion_pytorch": "lion-pytorch"}


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and what is told about it.

    Attributes:
        optimizer: the optimizer.
        description: `module.Class(k=v,...)`, as metadata shows it.
        relative_step: whether it sets its own learning rate (Adafactor).
        given: names of the arguments that the user gave.
        fused: whether weights are updated during the backward pass.
    """

    optimizer: torch.optim.Optimizer
    description: str
    relative_step: bool = False
    given: frozenset[str] = frozenset()
    fused: bool = False


def build_optimizer(options: OptimizerOptions, groups: Iterable[Mapping[str, Any]]) -> BuiltOptimizer:
    """The optimizer of a run over the given parameter groups.

    Raises:
        UserError: unknown name, missing package, or arguments the optimizer does not take.
    """
    given = parse_arguments(options.optimizer_args, _ARGS)
    entry = OPTIMIZERS.get(options.name)
    optimizer_class = _own_class(entry) if entry else _other_class(options.shown_name)
    arguments = dict(given)
    groups = [dict(group) for group in groups]
    learning_rate: float | None = options.learning_rate
    if entry is not None:
        arguments = {**entry.defaults, **given}
        _check_fixed(entry, given)
    if options.sets_own_rate:
        arguments = {**arguments, "relative_step": True}
        learning_rate = None
        for group in groups:
            group.pop("lr", None)
    elif options.finds_rate:
        _same_rates(groups, options)
    shown = arguments
    if entry is not None:
        arguments = {**arguments, **entry.fixed}
    optimizer = _construct(optimizer_class, groups, learning_rate, arguments, options)
    text = ",".join(f"{key}={value}" for key, value in shown.items())
    description = f"{optimizer_class.__module__}.{optimizer_class.__name__}" + (f"({text})" if text else "")
    fused = options.fused_backward_pass
    return BuiltOptimizer(optimizer, description, options.sets_own_rate, frozenset(given), fused)


def check_optimizer(options: OptimizerOptions) -> None:
    """Make the optimizer for a few numbers: wrong names and arguments show without a model.

    Raises:
        UserError: see `build_optimizer`; an optimizer that cannot train like others.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    built = build_optimizer(options, [{"params": [parameter]}])
    entry = OPTIMIZERS.get(options.name)
    for name, value in (entry.defaults if entry else {}).items():
        if name not in built.given:
            logger.warning("%s: %s=%s is used; choose another one in %s", entry.name, name, value, _ARGS)
    if entry is not None and entry.note:
        logger.warning("%s: %s", entry.name, entry.note)
    closure = inspect.signature(type(built.optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        message = "evaluates the loss several times in a step, which training here does not do; use another optimizer"
        raise UserError(_TYPE, options.shown_name, message)
    if entry is None and type(built.optimizer).__module__.startswith("torch.optim"):
        parameter.grad = torch.ones(2, 2)
        try:
            built.optimizer.step()
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(_TYPE, options.shown_name, f"cannot train dense weights: {error}") from error


def _own_class(entry: _Entry) -> type:
    module = optional_import(entry.module, needed_for=f"{_TYPE} {entry.name}", install=entry.install)
    found = getattr(module, entry.attribute, None)
    if found is None:
        message = f"this version of {entry.install} has no {entry.attribute}; run: pip install -U {entry.install}"
        raise UserError(_TYPE, entry.name, message)
    return found


def _other_class(name: str) -> type:
    """A class of torch.optim by its name, any other by `package.module.ClassName`."""
    module, dot, attribute = name.rpartition(".")
    if not dot:
        return _torch_class(name)
    top = module.partition(".")[0]
    place = optional_import(module, needed_for=f"{_TYPE} {name}", install=_INSTALL.get(top, top.replace("_", "-")))
    found = getattr(place, attribute, None)
    if not _is_optimizer(found):
        guess = nearest(attribute, _optimizers_in(place))
        hint = f"; did you mean {module}.{guess}?" if guess else ""
        raise UserError(_TYPE, name, f"{module} has no optimizer {attribute}{hint}")
    return found


def _torch_class(name: str) -> type:
    there = _optimizers_in(torch.optim)
    if name in there:
        return getattr(torch.optim, name)
    alike = [known for known in there if known.lower() == name.lower()]
    if alike:
        logger.warning("%s %s is taken as torch.optim.%s", _TYPE, name, alike[0])
        return getattr(torch.optim, alike[0])
    ours = [entry.name for entry in _ENTRIES]
    by_lower = {known.lower(): known for known in (*there, *ours)}
    guess = nearest(name.lower(), list(by_lower))
    hint = f"; did you mean {by_lower[guess]}?" if guess else ""
    message = f"unknown; known are {', '.join(ours)}, those of torch.optim, and package.module.ClassName{hint}"
    raise UserError(_TYPE, name, message)


def _is_optimizer(value: Any) -> bool:
    """Also classes that only behave like torch's."""
    if not inspect.isclass(value) or value is torch.optim.Optimizer:
        return False
    return issubclass(value, torch.optim.Optimizer) or all(
        callable(getattr(value, method, None)) for method in ("step", "zero_grad", "state_dict", "load_state_dict")
    )


def _optimizers_in(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if not name.startswith("_") and _is_optimizer(value)]


def _check_fixed(entry: _Entry, given: Mapping[str, Any]) -> None:
    for name, value in entry.fixed.items():
        if given.get(name, value) != value:
            raise UserError(_ARGS, f"{name}={given[name]}", f"{entry.name} means {name}={value}")


def _same_rates(groups: list[dict[str, Any]], options: OptimizerOptions) -> None:
    """An optimizer that finds its own rate knows one for all; parts that stand still may do so."""
    rates = [group.get("lr", options.learning_rate) for group in groups]
    moving = [rate for rate in rates if rate]
    if len(set(moving)) < 2:
        return
    logger.warning(
        "%s knows one learning rate for all parts: the first, %g, counts instead of %s",
        options.shown_name,
        moving[0],
        ", ".join(f"{rate:g}" for rate in moving[1:]),
    )
    for group, rate in zip(groups, rates):
        group["lr"] = moving[0] if rate else 0.0


def _construct(
    optimizer_class: type,
    groups: list[dict[str, Any]],
    learning_rate: float | None,
    arguments: Mapping[str, Any],
    options: OptimizerOptions,
) -> torch.optim.Optimizer:
    """The optimizer itself.

    Raises:
        UserError: arguments that it does not take.
    """
    name = options.shown_name
    parameters = inspect.signature(optimizer_class).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for key in arguments:
        if key == "lr":
            raise UserError(_ARGS, f"lr={arguments['lr']}", "use --learning_rate")
        if key not in parameters and not takes_all:
            known = [one for one in parameters if one not in ("params", "lr", "self")]
            guess = nearest(key, known)
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(_ARGS, key, f"{name} does not take these: it has {', '.join(known)}{hint}")
    try:
        optimizer = optimizer_class(groups, lr=learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError, IndexError) as error:
        if "learning rate" in str(error).lower():
            raise UserError("--learning_rate", learning_rate, f"{name} does not take it: {error}") from error
        raise UserError(_ARGS, options.optimizer_args, f"{name} does not take these: {error}") from error
    defaults = getattr(optimizer, "defaults", {})
    for key in arguments:
        if key not in parameters and key not in defaults:
            logger.warning("%s %s: nothing shows that %s reads it", _ARGS, key, name)
    return optimizer


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains on other weights than those that are to be used, and can put either in place."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
