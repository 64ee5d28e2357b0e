"""Small checks that many groups need."""

from collections.abc import Iterator
from typing import Any

from library.base.errors import Problem


def at_least(minimum: float, **values: float | None) -> Iterator[Problem]:
    """A problem for each value below `minimum`; None passes. Names are field names."""
    for name, value in values.items():
        if value is not None and value < minimum:
            yield Problem(f"--{name}", f"must be at least {minimum:g}", value)


def above(limit: float, **values: float | None) -> Iterator[Problem]:
    """A problem for each value that is not greater than `limit`; None passes. Names are field names."""
    for name, value in values.items():
        if value is not None and value <= limit:
            yield Problem(f"--{name}", f"must be greater than {limit:g}", value)


def share(**values: float | None) -> Iterator[Problem]:
    """A problem for each value outside 0..1; None passes. Names are field names."""
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            yield Problem(f"--{name}", "must be between 0 and 1", value)


def exclusive(group: Any, first: str, second: str, why: str = "use one of them") -> Iterator[Problem]:
    """A problem when two switches of a group are both set."""
    if getattr(group, first) and getattr(group, second):
        yield Problem(f"--{first}", f"cannot be combined with --{second}: {why}")
