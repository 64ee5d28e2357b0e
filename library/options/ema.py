"""Options about averaging the trained weights over time."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Averaged weights: a second, smoother result beside the trained one."""

    ema_decay: float | None = option(None, help="keep an average of the weights that forgets at this rate, about 0.999")
    ema_device: str = option("device", help="where the average is kept", choices=("device", "cpu"))
    ema_no_warmup: bool = option(False, help="use the full decay from the first step on, instead of a faster start")
    ema_samples: str = option(
        "trained", help="weights that sample images and validation use", choices=("trained", "ema", "both")
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield Problem("--ema_decay", "must be between 0 and 1, for example 0.999", self.ema_decay)
