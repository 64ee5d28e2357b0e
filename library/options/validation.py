"""Options about measuring the loss on images that are not trained."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation: the loss on images that are kept out of training."""

    validation_split: float = option(0.0, help="share of the images kept for validation")
    validation_seed: int | None = option(None, help="seed of the choice and of validation noise; --seed when not given")
    validate_every_n_steps: int | None = option(None, help="validate every n steps")
    validate_every_n_epochs: int | None = option(None, help="validate every n epochs; every epoch when not given")
    max_validation_steps: int | None = option(None, help="batches per validation at most")
    validate_at_first: bool = option(False, help="validate before the first step too")
    save_best: bool = option(False, help="keep the result with the lowest validation loss as <output_name>-best")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if not 0 <= self.validation_split < 1:
            yield Problem("--validation_split", "must be at least 0 and below 1", self.validation_split)
        yield from at_least(
            1,
            validate_every_n_steps=self.validate_every_n_steps,
            validate_every_n_epochs=self.validate_every_n_epochs,
            max_validation_steps=self.max_validation_steps,
        )
