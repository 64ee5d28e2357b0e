"""Options about interrupting and resuming."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import above, at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class StateOptions:
    """State: everything needed to go on later."""

    save_state: bool = option(False, help="save the training state with every model")
    save_state_on_train_end: bool = option(False, help="save the training state at the end")
    save_last_n_epochs_state: int | None = option(None, help="keep the states of the last n epochs only")
    save_last_n_steps_state: int | None = option(None, help="keep the states of the last n steps only")
    save_state_every_n_minutes: float | None = option(
        None, help="save the training state so many minutes after the last one; only the latest such state is kept"
    )
    resume: str | None = option(
        None, help="folder of a saved state to go on from; auto: the furthest state of this name, if there is one"
    )
    resume_changed_data: bool = option(False, help="go on with the next epoch although the data changed")
    nan_policy: str = option(
        "stop", help="what to do when gradients are no numbers: stop, or skip the step", choices=("stop", "skip")
    )
    interactive: bool = option(
        False, help="take orders from stdin: save, save_state, sample, eval, lr X, status, pause, resume, quit, abort"
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1,
            save_last_n_epochs_state=self.save_last_n_epochs_state,
            save_last_n_steps_state=self.save_last_n_steps_state,
        )
        yield from above(0, save_state_every_n_minutes=self.save_state_every_n_minutes)
        if self.resume_changed_data and not self.resume:
            yield Problem("--resume_changed_data", "needs --resume")
