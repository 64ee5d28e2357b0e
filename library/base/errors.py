"""Errors that are meant for the person who started the run.

A `UserError` ends a script with exit code 2 and the text of its problems; anything else is a defect of ours.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class _Missing(Enum):
    """Stands for "no value given"; a member stays itself when it is sent to another process."""

    VALUE = 0


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user asked for.

    Attributes:
        where: the flag (`--network_dim`) or the place in a file (`dataset.toml: datasets[0].batch_size`).
        message: what was expected and what to do about it.
        value: the offending value; left out of the text when not given.
    """

    where: str
    message: str
    value: Any = _Missing.VALUE

    def __str__(self) -> str:
        shown = "" if self.value is _Missing.VALUE else f" = {self.value!r}"
        return f"{self.where}{shown}: {self.message}"


class UserError(Exception):
    """A mistake in options, files or data, reported without a traceback.

    `UserError("--blocks_to_swap", 40, "at most 36 for this model")` or `UserError(problems=[...])`.
    """

    def __init__(
        self,
        where: str = "",
        value: Any = _Missing.VALUE,
        message: str = "",
        *,
        problems: Iterable[Problem] | None = None,
    ) -> None:
        self.problems = list(problems) if problems is not None else [Problem(where, message, value)]
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.problems)


def _rebuild(kind: type[UserError], problems: list[Problem]) -> UserError:
    """The error with the same problems, in another process."""
    return kind(problems=problems)


class CheckpointError(UserError):
    """A model or adapter file that cannot be used: unreadable, wrong family, missing or unexpected tensors."""


class FeatureNotAvailable(UserError):
    """Something that parses but that this version does not do yet."""


def raise_problems(problems: Iterable[Problem], error: type[UserError] = UserError) -> None:
    """Raise one error that lists every problem; nothing happens when there is none."""
    found = list(problems)
    if found:
        raise error(problems=found)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name closest to a misspelt one, or None when nothing is close."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None
