"""Running numbers of a run."""

import math
from collections import deque


class LossAverage:
    """Mean of the latest losses: a window of one epoch's micro-steps.

    Args:
        window: micro-steps per epoch.
    """

    def __init__(self, window: int) -> None:
        self._latest: deque[float] = deque(maxlen=max(1, window))

    def add(self, loss: float) -> None:
        """Take in the loss of one micro-step; one that is no number is left out."""
        if math.isfinite(loss):
            self._latest.append(loss)

    def state(self) -> list[float]:
        """The losses it averages."""
        return list(self._latest)

    @property
    def value(self) -> float:
        """The mean; nan before the first loss."""
        return sum(self._latest) / len(self._latest) if self._latest else float("nan")
