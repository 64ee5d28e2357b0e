"""What happens beside training: samples, saving, validation. Each leaves randomness and modes as it found them."""

import math
from collections.abc import Sequence
from typing import Protocol

from library.checkpoint.saver import Saver, StateSaver
from library.options.sampling import SamplingOptions
from library.sampling.runner import SampleRunner
from library.training.report import Progress
from library.training.state import TrainState
from library.training.validation import Validator
from library.training.weights import TrainedWeights


class Service(Protocol):
    """Something that happens at certain moments of a run."""

    def train_start(self, state: TrainState) -> None:
        """Before the first step."""
        ...

    def step_end(self, state: TrainState) -> None:
        """After an optimizer step."""
        ...

    def epoch_end(self, state: TrainState) -> None:
        """After a complete epoch; `state.epoch` is the one that ended."""
        ...

    def train_end(self, state: TrainState) -> None:
        """After the last step."""
        ...

    def ordered(self, verb: str, state: TrainState) -> bool:
        """Somebody asked for `save`, `save_state`, `sample` or `eval`; whether this service did it."""
        ...


class ServiceList:
    """Calls services in their order."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = list(services)

    def train_start(self, state: TrainState) -> None:
        """See Service."""
        for service in self.services:
            service.train_start(state)

    def step_end(self, state: TrainState) -> None:
        """See Service."""
        for service in self.services:
            service.step_end(state)

    def epoch_end(self, state: TrainState) -> None:
        """See Service."""
        for service in self.services:
            service.epoch_end(state)

    def train_end(self, state: TrainState) -> None:
        """See Service."""
        for service in self.services:
            service.train_end(state)

    def ordered(self, verb: str, state: TrainState) -> bool:
        """See Service."""
        done = [service.ordered(verb, state) for service in self.services]
        return any(done)


class SamplingService:
    """Makes sample images."""

    def __init__(self, options: SamplingOptions, runner: SampleRunner, weights: TrainedWeights) -> None:
        self.options = options
        self.runner = runner
        self.weights = weights

    def train_start(self, state: TrainState) -> None:
        """With `--sample_at_first`."""
        if self.options.sample_at_first and state.step == 0:
            self._make("e000000")

    def step_end(self, state: TrainState) -> None:
        """Every `--sample_every_n_steps`, unless epochs were asked for."""
        every = self.options.sample_every_n_steps
        if every and not self.options.sample_every_n_epochs and state.step % every == 0:
            self._make(f"{state.step:06d}")

    def epoch_end(self, state: TrainState) -> None:
        """Every `--sample_every_n_epochs`."""
        every = self.options.sample_every_n_epochs
        if every and state.epoch % every == 0:
            self._make(f"e{state.epoch:06d}")

    def train_end(self, state: TrainState) -> None:
        """Nothing."""

    def ordered(self, verb: str, state: TrainState) -> bool:
        """Samples now."""
        if verb == "sample":
            self._make(f"{state.step:06d}")
        return verb == "sample"

    def _make(self, occasion: str) -> None:
        for kind in self.weights.looked_at:
            with self.weights.shown(kind):
                self.runner.run(occasion if kind == "trained" else f"{occasion}_{kind}")


class SavingService:
    """Saves results; only on the main process."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def train_start(self, state: TrainState) -> None:
        """Nothing."""

    def step_end(self, state: TrainState) -> None:
        """By steps."""
        self.saver.after_step(state.step, state.epoch)

    def epoch_end(self, state: TrainState) -> None:
        """By epochs."""
        self.saver.after_epoch(state.step, state.epoch)

    def train_end(self, state: TrainState) -> None:
        """The final result."""
        self.saver.at_end(state.step, state.epoch)

    def ordered(self, verb: str, state: TrainState) -> bool:
        """A result now."""
        if verb == "save":
            self.saver.now(state.step, state.epoch)
        return verb == "save"


class StateService:
    """Saves training states; only on the main process, and after everything else that happens at a boundary."""

    def __init__(self, saver: StateSaver) -> None:
        self.saver = saver

    def train_start(self, state: TrainState) -> None:
        """Nothing."""

    def step_end(self, state: TrainState) -> None:
        """With results, or by time."""
        self.saver.after_step(state.step, state.epoch)

    def epoch_end(self, state: TrainState) -> None:
        """With results."""
        self.saver.after_epoch(state.step, state.epoch)

    def train_end(self, state: TrainState) -> None:
        """At the end."""
        self.saver.at_end(state.step, state.epoch)

    def ordered(self, verb: str, state: TrainState) -> bool:
        """A state now."""
        if verb == "save_state":
            self.saver.now(state.step, state.epoch)
        return verb == "save_state"


class ValidationService:
    """Validates, and keeps the best result.

    Args:
        validator: makes the losses.
        progress: is told of them.
        weights: what is looked at.
        at_first: validate before the first step too.
        saver: of the best result; None where none is kept.
    """

    def __init__(
        self,
        validator: Validator,
        progress: Progress,
        weights: TrainedWeights,
        *,
        at_first: bool,
        saver: Saver | None = None,
    ) -> None:
        self.validator = validator
        self.progress = progress
        self.weights = weights
        self.at_first = at_first
        self.saver = saver
        self._last: int | None = None

    def train_start(self, state: TrainState) -> None:
        """With `--validate_at_first`."""
        if self.at_first and state.step == 0:
            self._run(state, per_epoch=False)

    def step_end(self, state: TrainState) -> None:
        """By steps."""
        if self.validator.due_at_step(state):
            self._run(state, per_epoch=False)

    def epoch_end(self, state: TrainState) -> None:
        """By epochs."""
        if self.validator.due_at_epoch(state.epoch):
            self._run(state, per_epoch=True)

    def train_end(self, state: TrainState) -> None:
        """The final loss, unless the last step had one."""
        if self._last != state.step:
            self._run(state, per_epoch=False)

    def ordered(self, verb: str, state: TrainState) -> bool:
        """Validate now."""
        if verb == "eval":
            self._run(state, per_epoch=False)
        return verb == "eval"

    def _run(self, state: TrainState, *, per_epoch: bool) -> None:
        for number, kind in enumerate(self.weights.looked_at):
            with self.weights.shown(kind):
                found = self.validator.run()
            # the first kind is the one that counts: it is what "best" is judged by
            earlier = [loss for step, loss in self.progress.validation if 0 < step < state.step]
            self.progress.validated(found, state.step, per_epoch=per_epoch, kind="" if number == 0 else kind)
            if number == 0 and self.saver is not None and state.step and found.loss < min(earlier, default=math.inf):
                self.saver.best(state.step, state.epoch)
        self._last = state.step
