"""Updating each weight as soon as its gradient is there: no more than one gradient is held at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.optim.rounding import round_stochastically

_FLAG = "--fused_backward_pass"


def check_fused(world_size: int, *, half: bool) -> None:
    """Whether a run can update its weights during the backward pass.

    Args:
        world_size: processes.
        half: whether the run computes in float16.

    Raises:
        UserError: it cannot.
    """
    if world_size > 1:
        message = "works with one process: several have to add up their gradients before weights change"
        raise UserError(_FLAG, message=message)
    if half:
        message = "cannot be combined with --mixed_precision fp16, whose loss scale needs all gradients; use bf16"
        raise UserError(_FLAG, message=message)


class FusedUpdates:
    """Steps an optimizer for one parameter at a time, from hooks of the backward pass.

    The optimizer has to treat parameters independently, as Adafactor does. Gradients are not clipped: their total
    norm is known only when all weights are updated already. Weights in bfloat16 are updated in float32 and rounded
    stochastically. A gradient that is not finite is dropped, and its weight stays.

    Args:
        optimizer: what is stepped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._norms: list[Tensor] = []
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        """What happens to a parameter of group `number`; the group itself changes when a state is loaded."""

        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = parameter.grad.float().norm()
            self._norms.append(norm)
            if bool(torch.isfinite(norm)):
                self._update(parameter, self.optimizer.param_groups[number])
            parameter.grad = None

        return update

    def drop(self, loss: Tensor) -> bool:
        """Whether a loss is no number, so that its backward pass must not begin."""
        if bool(torch.isfinite(loss.detach())):
            return False
        self._norms.append(loss.detach().float())
        return True

    def taken_norm(self) -> Tensor:
        """Norm of all gradients since the last call, on the device; not finite when one of them was not."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The optimizer's own step for one parameter."""
        assert parameter.grad is not None
        target = parameter
        if parameter.dtype == torch.bfloat16:
            target = nn.Parameter(parameter.detach().float())
            target.grad = parameter.grad.float()
            self.optimizer.state[target] = self.optimizer.state[parameter]  # one state under both names meanwhile
        every = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [target]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = every
            if target is not parameter:
                del self.optimizer.state[target]
        if target is not parameter:
            with torch.no_grad():
                parameter.copy_(round_stochastically(target.detach()))
