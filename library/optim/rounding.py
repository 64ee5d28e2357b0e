"""Updating weights that are kept in bfloat16 without losing small changes.

bfloat16 has 8 significant bits: a change below 1/256 of a weight is lost when the sum is rounded to nearest. Either
rounding goes up or down by chance, so that the expected value is exact, or what rounding cuts off is kept in a second
bfloat16 number and added to the next change (Kahan, "Further remarks on reducing truncation errors", 1965; both as in
Zamirai et al., "Revisiting BFloat16 Training", 2020).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from library.base.randomness import address


def round_stochastically(values: Tensor, generator: Generator | None = None) -> Tensor:
    """float32 as bfloat16, up or down by chance so that the expected value is exact.

    A uniform 16-bit number is added to the bits that bfloat16 does not have, which are then cut off.

    Args:
        values: float32, any shape; values that are no numbers stay what they are.
        generator: on the device of the values; torch's own when None.
    """
    bits = values.contiguous().view(torch.int32)
    raised = bits + torch.randint(0, 1 << 16, bits.shape, dtype=bits.dtype, device=bits.device, generator=generator)
    rounded = torch.bitwise_and(raised, -65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


class WideUpdates:
    """Lets any optimizer see weights kept in bfloat16 as float32 while it steps.

    Args:
        parameters: what is trained; only those in bfloat16 are touched.
        kind: `stochastic` or `kahan`.
        seed: of the run.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, seed: int) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
        self.seed = seed
        self.remainders = [torch.zeros_like(one) for one in self.parameters] if kind == "kahan" else []

    @contextmanager
    def widened(self, step: int) -> Iterator[None]:
        """Weights and gradients are float32 inside; outside, the weights are rounded again, in their old memory.

        Args:
            step: optimizer steps taken, from which the draws of the rounding follow.
        """
        narrow = [parameter.data for parameter in self.parameters]
        for index, parameter in enumerate(self.parameters):
            gradient, parameter.grad = parameter.grad, None
            wide = narrow[index].float()
            parameter.data = wide + self.remainders[index].float() if self.remainders else wide
            if gradient is not None:
                parameter.grad = gradient.float()
        try:
            yield
        finally:
            for index, parameter in enumerate(self.parameters):
                wide, parameter.grad = parameter.data, None
                narrow[index].copy_(self._rounded(index, wide, step))
                parameter.data = narrow[index]

    def _rounded(self, index: int, wide: Tensor, step: int) -> Tensor:
        if not self.remainders:
            seed = address(self.seed, "rounding", step, index)
            return round_stochastically(wide, Generator(wide.device).manual_seed(seed))
        rounded = wide.to(torch.bfloat16)
        self.remainders[index].copy_(wide - rounded.float())
        return rounded

    def state(self) -> dict[str, Any]:
        """What has to be known to go on."""
        return {"remainders": self.remainders}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for ours, saved in zip(self.remainders, state["remainders"]):
            ours.copy_(saved)
