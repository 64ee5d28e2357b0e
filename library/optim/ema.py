"""An exponential moving average of trained weights (Polyak and Juditsky, 1992)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Follows parameters: average = d * average + (1 - d) * weights after every optimizer step.

    With warm-up d = min(decay, (1 + n) / (10 + n)) after n steps, so that the start does not weigh for long.

    Args:
        parameters: what is trained.
        decay: between 0 and 1.
        device: where the average is kept, in float32.
        warmup: begin with a smaller decay.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, decay: float, device: torch.device, warmup: bool = True
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.warmup = warmup
        self.count = 0
        self.average = [self._copied(parameter, device) for parameter in self.parameters]

    @staticmethod
    def _copied(parameter: nn.Parameter, device: torch.device) -> Tensor:
        return parameter.detach().to(device, torch.float32, copy=True)

    def restart(self) -> None:
        """Begin at the weights of now."""
        self.count = 0
        for average, parameter in zip(self.average, self.parameters):
            average.copy_(parameter.detach())

    @torch.no_grad()
    def update(self) -> None:
        """An optimizer step was taken."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.warmup else self.decay
        weights = [p.detach().to(a.device, torch.float32) for a, p in zip(self.average, self.parameters)]
        torch._foreach_lerp_(self.average, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, and bit for bit what they held before outside."""
        held = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(held)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        """What has to be known to go on."""
        return {"count": self.count, "average": self.average}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it belongs to other parameters.
        """
        shapes = [tuple(one.shape) for one in state["average"]]
        if shapes != [tuple(one.shape) for one in self.average]:
            raise ValueError("the averaged weights belong to other parameters")
        self.count = state["count"]
        for average, saved in zip(self.average, state["average"]):
            average.copy_(saved)
