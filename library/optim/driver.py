"""Backward, clipping, optimizer step and schedule, behind one interface for the loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.optim.registry import BuiltOptimizer
from library.optim.schedulers import Schedule


class OptimizerDriver:
    """Drives one optimizer.

    Args:
        built: the optimizer.
        schedule: learning-rate factor per step.
        parameters: everything that is trained, for clipping.
        max_grad_norm: total gradient norm allowed; 0 means no clipping.
        scaler: loss scaler of fp16 training, or None.
        names: log name of each parameter group.
    """

    def __init__(
        self,
        built: BuiltOptimizer,
        schedule: Schedule,
        parameters: Sequence[nn.Parameter],
        *,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.optimizer = built.optimizer
        self.description = built.description
        self.schedule = schedule
        self.parameters = list(parameters)
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.names = list(names)
        self.relative_step = built.relative_step
        self._given = built.given - {"params"}
        self._base = [group["lr"] for group in self.optimizer.param_groups]
        self.step_count = 0
        self._set_rate: float | None = None
        self._apply_schedule()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def clip(self) -> Tensor:
        """Limit the total gradient norm; returns the norm before clipping, on the device.

        Norm and limit are those of torch's clip_grad_norm_.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        return nn.utils.clip_grad_norm_(self.parameters, limit)

    def step(self) -> bool:
        """Update the parameters and move on in the schedule; False when the fp16 scaler skipped the step."""
        stepped = True
        if self.scaler:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            stepped = self.scaler.get_scale() >= before
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self.step_count += 1
            self._apply_schedule()
        return stepped

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Schedule-free optimizers train on other weights than those to be used: inside, these are in place."""
        switches = callable(getattr(self.optimizer, "train", None)) and callable(getattr(self.optimizer, "eval", None))
        if switches:
            self.optimizer.eval()
        try:
            yield
        finally:
            if switches:
                self.optimizer.train()

    def skip(self) -> None:
        """Forget the gradients of a step that is left out."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What has to be known to go on: the optimizer's state, the scaler's, a rate that was set by hand."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "set_rate": self._set_rate,
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from a state at an optimizer step.

        Raises:
            ValueError: it belongs to other parameters.
        """
        # arguments given for this run count; others may be what the optimizer itself has learned
        own = [{name: group[name] for name in self._given & group.keys()} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own):
            group.update(values)
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self._set_rate = state.get("set_rate")
        self.go_to(step)

    def go_to(self, step: int) -> None:
        """Let the schedule stand after `step` optimizer steps."""
        self.step_count = step
        self._apply_schedule()

    def set_rate(self, rate: float) -> None:
        """From now on the first group has this rate times the schedule's factor, the others in their old proportion."""
        self._set_rate = rate
        self._apply_schedule()

    def _apply_schedule(self) -> None:
        if self.relative_step:
            return
        factor = self.schedule.factor(self.step_count)
        if self._set_rate is not None:
            factor *= self._set_rate / (self._base[0] or 1.0)
        for group, base in zip(self.optimizer.param_groups, self._base):
            group["lr"] = base * factor

    def learning_rates(self) -> dict[str, float]:
        """Current rate of every group by its log name; equal names are numbered."""
        rates: dict[str, float] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            name = self.names[index].strip() if index < len(self.names) else f"group{index}"
            key = name if name not in rates else f"{name} ({index})"
            rates[key] = self._relative_rate(group) if self.relative_step else float(group["lr"])
        return rates

    def _relative_rate(self, group: dict[str, Any]) -> float:
        """Adafactor's own rate; 0 before its first step."""
        state = next((self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state), None)
        return float(self.optimizer._get_lr(group, state)) if state else 0.0
