"""Options about interrupting and resuming."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class StateOptions:
    """State: everything needed to go on later."""

    save_state: bool = option(False, help="save the training state with every model")
    save_state_on_train_end: bool = option(False, help="save the training state at the end")
    save_last_n_epochs_state: int | None = option(None, help="keep the states of the last n epochs only")
    save_last_n_steps_state: int | None = option(None, help="keep the states of the last n steps only")
    resume: str | None = option(None, help="folder of a saved state to go on from")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1,
            save_last_n_epochs_state=self.save_last_n_epochs_state,
            save_last_n_steps_state=self.save_last_n_steps_state,
        )
