"""Backward, clipping, optimizer step and schedule, behind one interface for the loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from library.base.logs import logger
from library.optim.custom import AttachedSchedule, CustomSchedule
from library.optim.fused import FusedUpdates
from library.optim.registry import BuiltOptimizer, has_modes
from library.optim.rounding import WideUpdates
from library.optim.schedulers import Schedule

_ALIGNMENT = 64  # bytes, of torch's own memory


class OptimizerDriver:
    """Drives one optimizer.

    Args:
        built: the optimizer.
        schedule: learning-rate factor per step, or a class that sets rates itself.
        parameters: everything that is trained, for clipping.
        max_grad_norm: total gradient norm allowed; 0 means no clipping.
        scaler: loss scaler of fp16 training, or None.
        wide: how weights in bfloat16 take up small changes; None rounds them to nearest.
        names: log name of each parameter group.
    """

    def __init__(
        self,
        built: BuiltOptimizer,
        schedule: Schedule | CustomSchedule,
        parameters: Sequence[nn.Parameter],
        *,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None = None,
        wide: WideUpdates | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.optimizer = built.optimizer
        self.description = built.description
        self.parameters = list(parameters)
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.wide = wide
        self.names = list(names)
        self.relative_step = built.relative_step
        self._given = built.given - {"params"}
        self._base = [group["lr"] for group in self.optimizer.param_groups]
        self._modes = has_modes(self.optimizer)
        if self._modes:
            self.optimizer.train()
        known = [set(group) for group in self.optimizer.param_groups]
        self.schedule = schedule if isinstance(schedule, Schedule) else None
        self._own: AttachedSchedule | None = None
        if isinstance(schedule, CustomSchedule):
            self._own = schedule.attach(self.optimizer)
        # what the schedule's class keeps in the groups
        self._scheduled = [set(group) - keys for group, keys in zip(self.optimizer.param_groups, known)]
        self._fused = FusedUpdates(self.optimizer) if built.fused else None
        self.step_count = 0
        self._set_rate: float | None = None
        self._apply_schedule()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss; fused, update the weights too, unless the loss is no number."""
        if self._fused and self._fused.drop(loss):
            return
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def clip(self) -> Tensor:
        """Limit the total gradient norm; returns the norm before clipping, on the device.

        Norm and limit are those of torch's clip_grad_norm_. Fused updates are done by now, unclipped.
        """
        if self._fused:
            return self._fused.taken_norm()
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
        elif not self._fused:
            with self.wide.widened(self.step_count) if self.wide else nullcontext():
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stepped:
            self._advance()
        return stepped

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Schedule-free optimizers train on other weights than those that are to be used: inside, these are in place.

        Outside, the weights are bit for bit what they were: the optimizer's own way back rounds, so copies are kept
        meanwhile, in main memory.
        """
        if not self._modes:
            yield
            return
        held = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, held):
                    parameter.copy_(value)

    def skip(self) -> None:
        """Forget the gradients of a step that is left out; it counts in the schedule, as it does in the run."""
        self.optimizer.zero_grad(set_to_none=True)
        self._advance()

    def state(self) -> dict[str, Any]:
        """What has to be known to go on: of the optimizer, the scaler, the schedule's class; a rate set by hand."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "set_rate": self._set_rate,
            "schedule": self._own.state() if self._own else None,
            "wide": self.wide.state() if self.wide else None,
        }

    def load_state(self, state: dict[str, Any], step: int) -> None:
        """Go on from a state at an optimizer step.

        Raises:
            ValueError: it belongs to other parameters.
        """
        # arguments given for this run count; others may be what the optimizer itself has learned
        before = [dict(group) for group in self.optimizer.param_groups]
        saved = state.get("schedule")
        goes_on = self._own is not None and saved is not None and saved["name"] == self._own.name
        self.optimizer.load_state_dict(state["optimizer"])
        self._keep_formats(state["optimizer"])
        for group, old, scheduled in zip(self.optimizer.param_groups, before, self._scheduled):
            own = self._given | (set() if goes_on else scheduled)
            group.update({name: old[name] for name in own & old.keys()})
            for name in old.keys() - group.keys():  # what an earlier version of the optimizer did not have
                group[name] = old[name]
        if self._modes:  # a state of another program may hold the other weights
            self.optimizer.train()
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.wide and state.get("wide"):
            self.wide.load_state(state["wide"])
        self._set_rate = state.get("set_rate")
        if self._own and goes_on:
            self._own.load_state(saved)
        self.go_to(step)

    def _keep_formats(self, saved: dict[str, Any]) -> None:
        """Undo torch's conversion of an optimizer's numbers to the format of its weights; they may be finer.

        What lies in a mapped file is copied into memory of torch's own: how sums are cut, and so their last bits,
        depends on the alignment of the addresses.
        """
        numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        for number, parameter in zip(numbers, parameters):
            now = self.optimizer.state.get(parameter, {})
            for name, value in saved["state"].get(number, {}).items():
                there = now.get(name)
                if isinstance(value, Tensor) and isinstance(there, Tensor) and there.dtype != value.dtype:
                    now[name] = value.to(there.device, copy=True)
            for name, there in now.items():
                if isinstance(there, Tensor) and there.device.type == "cpu" and there.data_ptr() % _ALIGNMENT:
                    now[name] = there.clone()

    def go_to(self, step: int) -> None:
        """Let the schedule stand after `step` optimizer steps."""
        self.step_count = step
        if self._own:
            self._own.go_to(step)
        self._apply_schedule()

    def set_rate(self, rate: float) -> None:
        """From now on the first group has this rate times the schedule's factor, the others in their old proportion."""
        if self.relative_step:
            logger.warning("Adafactor works out its own rate: the order changes nothing")
        self._set_rate = rate
        self._apply_schedule()

    def _advance(self) -> None:
        self.step_count += 1
        if self._own:
            self._own.step()
        self._apply_schedule()

    def _apply_schedule(self) -> None:
        if self.relative_step:
            return
        scale = 1.0 if self._set_rate is None else self._set_rate / (self._base[0] or 1.0)
        for index, (group, base) in enumerate(zip(self.optimizer.param_groups, self._base)):
            if self._own:
                # rates that its class works out follow the rates it began with, maybe those of an earlier run
                began = self._own.bases[index]
                group["lr"] = self._own.rates[index] * scale * (base / began if began else 1.0)
            else:
                assert self.schedule is not None
                group["lr"] = base * self.schedule.factor(self.step_count) * scale

    def learning_rates(self) -> dict[str, float]:
        """Current rate of every group by its log name; equal names are numbered.

        Where the optimizer finds the size of its steps, `d`, there are entries `d*lr/<name>` too.
        """
        rates: dict[str, float] = {}
        found: dict[str, float] = {}
        plus = type(self.optimizer).__name__ == "ProdigyPlusScheduleFree"
        for index, group in enumerate(self.optimizer.param_groups):
            name = self.names[index].strip() if index < len(self.names) else f"group{index}"
            key = name if name not in rates else f"{name} ({index})"
            rates[key] = self._relative_rate(group) if self.relative_step else float(group["lr"])
            if "d" in group:
                label = f"d*lr/{key}" if not plus else f"d*lr/group{index}" if index else "d*lr"
                found[label] = float(group["d"]) * float(group["lr"])
        return {**rates, **found}

    def _relative_rate(self, group: dict[str, Any]) -> float:
        """Adafactor's own rate; 0 before its first step."""
        state = next((self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state), None)
        return float(self.optimizer._get_lr(group, state)) if state else 0.0
