"""What one flag is, and whether a value from a file or from Python fits it."""

import argparse
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from library.base.errors import nearest


class _Required:
    """Stands for the missing default of a value that must be given."""

    def __repr__(self) -> str:
        """Text for help and errors."""
        return "(required)"


REQUIRED = _Required()

_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def int_or_float(text: str) -> int | float:
    """A count ("100") or a share of the whole ("0.1", "10%")."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        number = float(text)
        return number if number < 1 and not text.lstrip("-").isdigit() else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"invalid value: {text!r} (a whole number of steps, a fraction below 1, or a percentage like 10%)"
        ) from error


_COUNT_OR_SHARE = "a whole number, or a fraction below 1"
_KIND_NAMES[int_or_float] = _COUNT_OR_SHARE


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag as a script offers it.

    Attributes:
        name: field name, attribute name (`dest`) and TOML key.
        kind: type of one value: bool, int, float, str, Path, or the `int_or_float` converter.
        many: takes several values.
        optional: None is a legal value from Python.
    """

    name: str
    kind: Any
    default: Any
    help: str
    many: bool = False
    optional: bool = False
    nargs: str | None = None
    choices: tuple[Any, ...] | None = None
    parse: Callable[[str], Any] | None = None
    flag: str = ""
    aliases: tuple[str, ...] = ()
    deprecated: str | None = None
    toml: bool = True

    @property
    def flags(self) -> tuple[str, ...]:
        """Every spelling on the command line, the main one first."""
        return (self.flag, *(f"--{alias}" for alias in self.aliases))

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        name = _KIND_NAMES[self.kind]
        return f"a list, each item {name}" if self.many else name


def _kind_of(annotation: Any) -> tuple[Any, bool, bool]:
    """(kind, many, optional) of a field annotation."""
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    optional = types.NoneType in parts
    parts = tuple(part for part in parts if part is not types.NoneType)
    if set(parts) == {int, float}:
        return int_or_float, False, optional
    (single,) = parts
    if typing.get_origin(single) is list:
        return typing.get_args(single)[0], True, optional
    return single, False, optional


def describe(field: Field, changed: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> Option | None:
    """The option behind a dataclass field; None for a field that is not a flag.

    Args:
        field: a field declared with `option(...)`.
        changed: defaults that a script changes, by name.
        choices: choices that a script changes, by name.
    """
    meta = field.metadata.get("option")
    if meta is None:
        return None
    kind, many, optional = _kind_of(field.type)
    return Option(
        name=field.name,
        kind=kind,
        many=many,
        optional=optional,
        default=changed.get(field.name, meta["default"]),
        help=meta["help"],
        nargs=meta["nargs"] or ("*" if many else None),
        choices=choices.get(field.name, meta["choices"]),
        parse=meta["parse"],
        flag=meta["flag"] or f"--{field.name}",
        aliases=meta["aliases"],
        deprecated=meta["deprecated"],
        toml=meta["toml"],
    )


def options_of(
    groups: Iterable[type],
    defaults: Mapping[str, Any] | None = None,
    hidden: Iterable[str] = (),
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[type, list[Option]]:
    """The options of each group, without the hidden ones; a name may occur once."""
    seen: set[str] = set()
    hidden = frozenset(hidden)
    result: dict[type, list[Option]] = {}
    for group in groups:
        result[group] = []
        for field in fields(group):
            option = describe(field, defaults or {}, choices or {})
            if option is None or option.name in hidden:
                continue
            assert option.name not in seen, f"two groups of one script declare {option.name}"
            seen.add(option.name)
            result[group].append(option)
    return result


def _fits(kind: Any, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int_or_float:
        return isinstance(value, int) or (isinstance(value, float) and value < 1)
    if kind is float:
        return isinstance(value, int | float)
    if kind is Path:
        return isinstance(value, str | Path)
    return isinstance(value, kind)


def _hint(option: Option, value: Any) -> str:
    """How to write a value of the wrong type."""
    if isinstance(value, str) and option.kind in (int, float, int_or_float):
        try:
            float(value)
            return f"; write {value.strip()} without quotes"
        except ValueError:
            return ""
    if isinstance(value, str) and option.kind is bool and value.lower() in ("true", "false"):
        return f"; write {value.lower()} without quotes"
    if isinstance(value, float) and option.kind in (int, int_or_float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool) and option.kind in (str, Path):
        return f'; write "{value}"'
    return ""


def accept(option: Option, value: Any) -> tuple[Any, str | None]:
    """Check a value that did not come from the command line.

    Returns:
        (value as stored, None), or (value, what is wrong).
    """
    if value is None and option.optional:
        return None, None
    if option.many and isinstance(value, list | tuple):
        items = [_accept_one(option, item) for item in value]
        wrong = next((message for _, message in items if message), None)
        return (value, wrong) if wrong else ([item for item, _ in items], None)
    stored, wrong = _accept_one(option, value)
    return (stored, wrong) if wrong or not option.many else ([stored], None)


def _accept_one(option: Option, value: Any) -> tuple[Any, str | None]:
    if option.kind is int_or_float and isinstance(value, str) and value.endswith("%"):
        try:
            return int_or_float(value), None
        except argparse.ArgumentTypeError as error:
            return value, str(error)
    if not _fits(option.kind, value):
        return value, f"expected {option.expected}{_hint(option, value)}"
    if option.choices and value not in option.choices:
        close = nearest(str(value), [str(choice) for choice in option.choices])
        return value, f"expected {option.expected}" + (f"; did you mean {close!r}?" if close else "")
    if option.kind is Path:
        return Path(value), None
    if option.kind is float:
        return float(value), None
    return value, None
