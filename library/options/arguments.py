"""`name=value` arguments for classes of other packages."""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from library.base.errors import Problem, raise_problems


def _read(pair: str) -> tuple[str, Any]:
    """One `name=value`; everything after the first `=` is the value.

    Raises:
        ValueError: no `=`, no name, or a value that is no Python literal; the text says which.
    """
    name, equals, text = pair.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError("expected name=value")
    try:
        return name.strip(), ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("the value must be a Python literal; text needs quotes, e.g. name='text'") from error


def argument_problems(pairs: Sequence[str] | None, flag: str) -> Iterator[Problem]:
    """A problem for each entry that cannot be read, and for names that are given twice."""
    seen: set[str] = set()
    for pair in pairs or ():
        try:
            name, _ = _read(pair)
        except ValueError as error:
            yield Problem(flag, str(error), pair)
            continue
        if name in seen:
            yield Problem(flag, f"{name} is given twice", pair)
        seen.add(name)


def parse_arguments(pairs: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """`["betas=0.9,0.99", "weight_decay=0.1"]` as keyword arguments, values read as Python literals.

    Raises:
        UserError: see `argument_problems`.
    """
    raise_problems(argument_problems(pairs, flag))
    return dict(_read(pair) for pair in pairs or ())
