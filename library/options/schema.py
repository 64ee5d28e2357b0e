"""Options as dataclass groups: declaration, parser, precedence.

A group is a frozen, keyword-only dataclass whose fields are declared with `option(...)`. The command-line parser is
made from the groups of a script. A value comes from the command line, else from the file of `--config_file`, else from
the default; `OptionSet.origin` tells which.
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

from library.base.errors import Problem, UserError, nearest, raise_problems
from library.options.config_file import SECRETS, FileValues, config_path, dump_toml
from library.options.values import REQUIRED, Option, accept, int_or_float, options_of

__all__ = ["REQUIRED", "OptionSet", "build_parser", "from_values", "option", "parse", "write_config"]

G = TypeVar("G")
logger = logging.getLogger("diffusion_scripts")

_UNSET = object()
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", int_or_float: "N|X"}


def option(
    default: Any = REQUIRED,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    nargs: str | None = None,
    parse: Callable[[str], Any] | None = None,
    **extra: Any,
) -> Any:
    """Declare a flag as a field of a group; the type comes from the annotation.

    `bool` makes a switch, `X | None` an optional X, `list[X]` zero or more, `int | float` a count or a share.

    Args:
        default: value when nobody sets it; a mutable one is never changed by us.
        help: one sentence for `--help`.
        choices: the only legal values.
        nargs: as in argparse; `*` for lists when left out.
        parse: converter for the command line instead of the type.
        **extra: `flag` (spelling other than `--<field name>`), `aliases` (further names, without dashes), `deprecated`
            (what to use instead; using the flag warns), `toml` (False: command line only).
    """
    unknown = set(extra) - {"flag", "aliases", "deprecated", "toml"}
    if unknown:
        raise TypeError(f"option() does not know {sorted(unknown)}")
    meta = {
        "default": default,
        "help": help,
        "choices": tuple(choices) if choices else None,
        "nargs": nargs,
        "parse": parse,
        "flag": extra.get("flag"),
        "aliases": tuple(extra.get("aliases", ())),
        "deprecated": extra.get("deprecated"),
        "toml": extra.get("toml", True),
    }
    if default is REQUIRED:
        return field(metadata={"option": meta})
    return field(default=default, metadata={"option": meta})


class OptionSet:
    """The option groups of one run and where each value came from. Immutable."""

    def __init__(
        self,
        groups: Mapping[type, Any],
        origins: Mapping[str, str],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._groups = dict(groups)
        self._origins = dict(origins)
        self._defaults = dict(defaults)
        self._aliases = dict(aliases or {})

    def __getitem__(self, group: type[G]) -> G:
        """The group of this class."""
        return self._groups[group]

    def __contains__(self, group: type) -> bool:
        """Whether the script has the group."""
        return group in self._groups

    def get(self, group: type[G]) -> G | None:
        """The group, or None when the script does not have it."""
        return self._groups.get(group)

    @property
    def groups(self) -> tuple[type, ...]:
        """The group classes, in help order."""
        return tuple(self._groups)

    @property
    def offered(self) -> frozenset[str]:
        """Names of the options that the script offers (a group may hold more: those keep their defaults)."""
        return frozenset(self._defaults)

    def origin(self, name: str) -> str:
        """Where a value came from: "default", "file", "cli" or "api"."""
        return self._origins.get(name, "default")

    def value(self, name: str) -> Any:
        """One flag's value by name; the family's own loaders use it, since their groups live above them."""
        return self.values()[name]

    def values(self) -> dict[str, Any]:
        """Every flag's value by name."""
        return {
            item.name: getattr(group, item.name)
            for group in self._groups.values()
            for item in fields(group)
            if "option" in item.metadata
        }

    def changed(self) -> dict[str, Any]:
        """The values that differ from this script's defaults."""
        values = self.values()
        return {name: values[name] for name, default in self._defaults.items() if values[name] != default}

    def replace(self, group: type, **values: Any) -> "OptionSet":
        """A copy with some values of one group changed; their origin becomes "api"."""
        groups = {**self._groups, group: replace(self._groups[group], **values)}
        return OptionSet(groups, {**self._origins, **dict.fromkeys(values, "api")}, self._defaults, self._aliases)

    def with_group(self, instance: Any) -> "OptionSet":
        """A copy that also holds `instance`, under its class."""
        return OptionSet({**self._groups, type(instance): instance}, self._origins, self._defaults, self._aliases)

    def namespace(self) -> SimpleNamespace:
        """All flags as attributes of one object, for third-party code that wants `args`."""
        values = self.values()
        return SimpleNamespace(**values, **{alias: values[name] for alias, name in self._aliases.items()})

    def problems(self) -> Iterator[Problem]:
        """What each group finds wrong with itself."""
        for group in self._groups.values():
            if hasattr(group, "problems"):
                yield from group.problems()


class _Parser(argparse.ArgumentParser):
    """Reports mistakes in one line with the nearest valid spelling."""

    raise_errors = False

    def error(self, message: str) -> NoReturn:
        problem = _argparse_problem(message, self)
        if self.raise_errors:
            raise UserError(problems=[problem])
        self.exit(2, f"error: {problem}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; unknown flags are named with the nearest known one."""
        parsed, extra = self.parse_known_args(args, namespace)
        problems = list(_unknown_flags(extra, self))
        if problems and self.raise_errors:
            raise UserError(problems=problems)
        if problems:
            self.exit(2, "".join(f"error: {problem}\n" for problem in problems))
        return parsed


def _argparse_problem(message: str, parser: argparse.ArgumentParser) -> Problem:
    match = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
    if not match:
        return Problem("command line", message)
    flag, text = match[1].split("/")[0], match[2]
    wrong = re.match(r"invalid choice: '([^']*)'", text)
    if wrong:
        action = next(action for action in parser._actions if flag in action.option_strings)
        close = nearest(wrong[1], [str(choice) for choice in action.choices or ()])
        text += f"; did you mean {close!r}?" if close else ""
    return Problem(flag, text)


def _unknown_flags(extra: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[Problem]:
    known = [flag for action in parser._actions for flag in action.option_strings]
    after_flag = False
    for text in extra:
        if text.startswith("-") and not re.match(r"-[\d.]", text):
            close = nearest(text.split("=")[0], known)
            yield Problem(text.split("=")[0], "unknown flag" + (f"; did you mean {close}?" if close else ""))
            after_flag = "=" not in text
        elif not after_flag:
            yield Problem(text, "unexpected argument; a value must follow its flag")


def build_parser(
    groups: Sequence[type],
    prog: str | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    hidden: frozenset[str] = frozenset(),
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> argparse.ArgumentParser:
    """A parser with one section per group.

    Args:
        groups: group classes, in help order.
        prog: name of the script; argparse finds it when None.
        description: first paragraph of the help.
        defaults: changed defaults, by field name.
        hidden: fields that this script does not offer.
        choices: changed choices, by field name.
    """
    parser = _Parser(prog=prog, description=description, usage="%(prog)s [options]")
    for group, options in options_of(groups, defaults, hidden, choices).items():
        if not options:
            continue
        title = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
        section = parser.add_argument_group(title)
        for item in options:
            section.add_argument(*item.flags, **_argparse_settings(item))
    return parser


def _argparse_settings(item: Option) -> dict[str, Any]:
    text = item.help.replace("%", "%%")
    if item.deprecated:
        text += f" [old: {item.deprecated}]".replace("%", "%%")
    if item.kind is bool:
        return {"dest": item.name, "action": "store_true", "default": item.default, "help": text}
    required = item.default is REQUIRED
    if required:
        text += " (required)"
    elif item.default not in (None, ""):
        text += f" (default: {item.default})".replace("%", "%%")
    settings = {"dest": item.name, "type": item.parse or item.kind, "nargs": item.nargs, "help": text}
    settings["default"] = None if required else item.default
    if item.choices:
        settings["choices"] = item.choices
    else:
        settings["metavar"] = _METAVARS[item.kind]
    return settings


def _parse_argv(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[dict[str, Any], list[Problem]]:
    """Values that were really given. argparse fills in a default only where the namespace has nothing yet."""
    parser.raise_errors = True
    blank = {action.dest: _UNSET for action in parser._actions if action.dest != "help"}
    namespace, extra = parser.parse_known_args(argv, argparse.Namespace(**blank))
    given = {name: value for name, value in vars(namespace).items() if name in blank and value is not _UNSET}
    return given, list(_unknown_flags(extra, parser))


def parse(
    groups: Sequence[type],
    argv: Sequence[str] | None,
    *,
    prog: str | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    hidden: frozenset[str] = frozenset(),
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> OptionSet:
    """Read the command line and the file of `--config_file`. Command line over file over default.

    Args:
        groups: group classes, in help order.
        argv: arguments without the script's name; None means those of this process.
        prog: name of the script.
        description: first paragraph of the help.
        defaults: changed defaults, by field name.
        hidden: fields that this script does not offer.
        choices: changed choices, by field name.

    Raises:
        UserError: unknown flags, wrong types or choices, missing required values, all together.
    """
    parser = build_parser(groups, prog, description, defaults, hidden, choices)
    given, problems = _parse_argv(parser, sys.argv[1:] if argv is None else argv)
    shapes = options_of(groups, defaults, hidden, choices)
    items = [item for options in shapes.values() for item in options]
    file = None
    if given.get("config_file") and not given.get("output_config"):
        file = FileValues(config_path(given["config_file"]))
        file.read(items)
        file.finish(strict=given.get("strict_config") or file.values.get("strict_config") is True)
        problems += file.problems
    origins = {**dict.fromkeys(file.values if file else (), "file"), **dict.fromkeys(given, "cli")}
    values = {**(file.values if file else {}), **given}
    if file and file.network_arguments:
        _append_network_arguments(file, values, origins)
    return _finish(shapes, values, origins, problems)


def _append_network_arguments(file: FileValues, values: dict[str, Any], origins: dict[str, str]) -> None:
    present = list(values.get("network_args") or ())
    names = {text.split("=")[0] for text in present}
    added = [text for text in file.network_arguments if text.split("=")[0] not in names]
    if added:
        logger.warning("%s: passed on to the network module as --network_args: %s", file.path, " ".join(added))
        values["network_args"] = present + added
        origins.setdefault("network_args", "file")


def from_values(
    groups: Sequence[type],
    values: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    hidden: frozenset[str] = frozenset(),
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> OptionSet:
    """Options from Python values by field name; their origin is "api".

    Raises:
        UserError: unknown names, wrong types or choices, missing required values, all together.
    """
    shapes = options_of(groups, defaults, hidden, choices)
    names = {key: item for options in shapes.values() for item in options for key in (item.name, *item.aliases)}
    problems, checked = [], {}
    for key, value in values.items():
        item = names.get(key)
        if item is None:
            close = nearest(key, list(names))
            problems.append(Problem(key, "is not an option" + (f"; did you mean {close!r}?" if close else "")))
        elif not item.toml:
            problems.append(Problem(key, "belongs to the command line"))
        else:
            stored, wrong = accept(item, value)
            if wrong:
                problems.append(Problem(key, wrong, value))
            checked[item.name] = stored
    return _finish(shapes, checked, dict.fromkeys(checked, "api"), problems)


def _finish(
    shapes: Mapping[type, Sequence[Option]],
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    problems: list[Problem],
) -> OptionSet:
    """Add defaults, check that nothing is missing, build the groups."""
    items = [item for options in shapes.values() for item in options]
    for item in items:
        if item.default is REQUIRED and item.name not in values and not values.get("output_config"):
            problems.append(Problem(item.flag, f"is required: {item.help}"))
        if item.deprecated and item.name in values:
            logger.warning("%s is an old flag: %s", item.flag, item.deprecated)
    raise_problems(problems)
    defaults = {item.name: None if item.default is REQUIRED else item.default for item in items}
    groups = {
        group: group(**{item.name: values.get(item.name, defaults[item.name]) for item in options})
        for group, options in shapes.items()
    }
    aliases = {alias: item.name for item in items for alias in item.aliases}
    return OptionSet(groups, origins, defaults, aliases)


def write_config(options: OptionSet, path: Path) -> None:
    """Write the values that differ from the defaults as TOML; secrets are left out.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    unwritten = SECRETS | {"config_file", "output_config"}
    values = {name: value for name, value in options.changed().items() if name not in unwritten}
    try:
        with open(path, "x", encoding="utf-8", newline="\n") as file:
            file.write(dump_toml(values))
    except FileExistsError as error:
        raise UserError("--output_config", str(path), "exists already; name another file or remove it") from error
    except OSError as error:
        raise UserError("--output_config", str(path), f"cannot be written: {error.strerror or error}") from error
