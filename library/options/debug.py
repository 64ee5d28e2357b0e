"""Options for finding out what a run does."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Record and replay: the exact inputs of every step."""

    record_steps: str | None = option(None, help="folder to write the inputs of every micro-step to")
    replay_steps: str | None = option(None, help="folder of such a record to train on again")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.record_steps is not None and self.record_steps == self.replay_steps:
            yield Problem("--record_steps", "must be another folder than --replay_steps", self.record_steps)
