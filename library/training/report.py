"""What a run says before, while and after it trains."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.logs import logger
from library.checkpoint.saver import Names
from library.data.build import ImageSets
from library.data.report import dataset_findings
from library.tracking.events import EventLog
from library.tracking.metrics import LossAverage
from library.tracking.plot import plot_losses
from library.tracking.trackers import Moment
from library.training.memory import peak_bytes, readable
from library.training.plan import RunPlan, bucket_rows
from library.training.state import TrainState
from library.training.validation import ValidationLosses


def plan_rows(plan: RunPlan, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plan as (name, value) lines.

    Args:
        plan: what will be done.
        facts: further lines from the family and the task.
    """
    rows = [("model", f"{facts.pop('family')} {plan.variant.name}"), *dataset_rows(plan.images)]
    per_step = f"{plan.accumulation} x {plan.world_size} process" + ("es" if plan.world_size > 1 else "")
    rows += [
        ("batches per epoch", f"{plan.num_batches}, {per_step} per optimizer step"),
        ("optimizer steps", f"{plan.max_steps} ({plan.steps_per_epoch} per epoch, {plan.num_epochs} epochs)"),
        ("seed", str(plan.seed)),
        ("precision", f"weights {_name(plan.dtype)}, VAE {_name(plan.vae_dtype)}"),
    ]
    return rows + [(name, str(value)) for name, value in facts.items()]


def dataset_rows(images_of: ImageSets) -> list[tuple[str, str]]:
    """What is trained on: subsets, buckets, and what is odd about them."""
    rows: list[tuple[str, str]] = []
    for number, images in enumerate(images_of.train):
        size = "x".join(map(str, images.plan.resolution))
        kind = "buckets" if images.plan.enable_bucket else "one size"
        rows.append((f"dataset {number}", f"{size} ({kind}), batch size {images.plan.batch_size}"))
        for index, subset in enumerate(images.plan.subsets):
            members = [n for n, record in enumerate(images.records) if record.subset == index]
            captioned = sum(bool(images.records[n].caption) for n in members)
            visits = sum(images.repeats[n] for n in members)
            kind = ", regularization" if subset.is_reg else ""
            masks = sum(images.records[n].control is not None or subset.alpha_mask for n in members)
            masked = f", {masks} with mask" if masks else ""
            text = f"{len(members)} images, {captioned} with caption{masked}, {visits} visits per epoch{kind}"
            rows.append((f"  {subset.name}", text))
    for number, bucket, count, loss in bucket_rows(images_of):
        text = f"dataset {number}: {count} per epoch, {loss:.1%} cropped away"
        rows.append((f"  bucket {bucket[0]}x{bucket[1]}", text))
    held_out = sum(len(images.records) for images in images_of.validation)
    if held_out:
        rows.append(("validation", f"{held_out} images kept out of training"))
    return rows + [("look at", finding.message) for finding in dataset_findings(images_of.train)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Rows of two columns under a title."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "-" * min(110, max(len(line) for line in lines))
    return "\n".join([title, rule, *lines, rule])


class Progress:
    """The progress line, trackers and event log of a run.

    Losses stay on the device and are read one step late, so that looking at them never makes the device wait.

    Args:
        plan: what is done.
        state: where it is.
        device: where the model computes.
        events: machine-readable log.
        track: sends values to trackers: (values, moment).
        show: whether to draw the line.
    """

    def __init__(
        self,
        plan: RunPlan,
        state: TrainState,
        device: torch.device,
        events: EventLog,
        track: Callable[[dict[str, float], Moment], None],
        *,
        show: bool,
    ) -> None:
        self.state = state
        self.device = device
        self.events = events
        self.track = track
        self.average = LossAverage(plan.steps_per_epoch)
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self._pending: tuple[int, Tensor, dict[str, float | Tensor], float] | None = None
        self._bar = tqdm(
            total=plan.max_steps,
            initial=state.step,
            desc="steps",
            disable=not show,
            dynamic_ncols=True,
            # in a file or a pipe, a line now and then is enough
            mininterval=0.1 if sys.stderr.isatty() else 5.0,
        )
        self._waited = 0.0
        self._started = time.monotonic()

    def go_on(self, average: Sequence[float]) -> None:
        """Take up the numbers of an earlier run: its average, and what its event log still holds."""
        for loss in average:
            self.average.add(loss)
        for event in self.events.kept:
            if event["event"] == "step":
                self.steps.append(event["step"])
                self.losses.append(event["loss"])
            elif event["event"] == "validation":
                self.validation.append((event["step"], event["loss"]))

    def status(self) -> str:
        """The numbers of now, in words."""
        self.flush()
        last = f"loss {self.losses[-1]:.4f}, " if self.losses else ""
        return f"{last}average {self.average.value:.4f}"

    def waited(self, seconds: float) -> None:
        """Time the loop stood still for data."""
        self._waited += seconds

    def step_end(self, loss: Tensor, values: Mapping[str, float | Tensor]) -> None:
        """One optimizer step is done.

        Args:
            loss: mean loss of its micro-steps, on the device.
            values: learning rates and other numbers, by tracker name.
        """
        self.flush()
        self._pending = self.state.step, loss, dict(values), self._waited
        self._waited = 0.0
        self._bar.update(1)
        if self.state.finished or self.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Read the loss that is still on the device."""
        if self._pending is None:
            return
        step, tensor, pending, waited = self._pending
        self._pending = None
        loss = float(tensor)
        values = {name: float(value) for name, value in pending.items()}
        self.average.add(loss)
        self.steps.append(step)
        self.losses.append(loss)
        moment = Moment(step, self.state.epoch)
        self.track({"loss/current": loss, "loss/average": self.average.value, **values}, moment)
        self.events.write("step", step=step, epoch=self.state.epoch, loss=loss, data_wait=round(waited, 4), **values)
        if not self._bar.disable:
            rate = next((value for name, value in values.items() if name.startswith("lr/")), 0.0)
            peak = readable(peak_bytes(self.device))
            text = f"loss={loss:.4f} avg={self.average.value:.4f} lr={rate:.2e} wait={waited * 1000:.0f}ms peak={peak}"
            self._bar.set_postfix_str(text, refresh=False)

    def epoch_end(self, epoch: int) -> None:
        """An epoch is complete."""
        self.flush()
        moment = Moment(self.state.step, epoch, per_epoch=True)
        self.track({"loss/epoch_average": self.average.value}, moment)
        self.events.write("epoch", epoch=epoch, step=self.state.step, loss=self.average.value)

    def validated(self, found: ValidationLosses, step: int, *, per_epoch: bool, kind: str = "") -> None:
        """A validation is done.

        Args:
            found: its losses.
            step: optimizer steps taken.
            per_epoch: whether it belongs to the end of an epoch.
            kind: of the weights, where others than the run's own were looked at.
        """
        self.flush()
        loss = found.loss
        when, of = "epoch" if per_epoch else "step", f"_{kind}" if kind else ""
        averages = {f"loss/validation{of}/{when}_average": loss}
        values = {f"loss/validation{of}/timestep_{t}": one for t, one in found.by_timestep.items()}
        if len(found.by_dataset) > 1:
            values |= {f"loss/validation{of}/dataset_{n}": one for n, one in found.by_dataset.items()}
        if self.losses and not kind:
            averages[f"loss/validation/{when}_divergence"] = loss - self.average.value
        self.track(averages, Moment(step, self.state.epoch, per_epoch=per_epoch))
        self.track(values, Moment(step, self.state.epoch))
        details = {
            "by_timestep": {str(timestep): one for timestep, one in found.by_timestep.items()},
            "by_dataset": {str(number): one for number, one in found.by_dataset.items()},
        }
        if not kind:
            self.validation.append((step, loss))
        name = f"validation_{kind}" if kind else "validation"
        self.events.write(name, step=step, epoch=self.state.epoch, loss=loss, **details)
        levels = ", ".join(f"{one:.4f} at {timestep}" for timestep, one in found.by_timestep.items())
        self.say(f"validation loss{' of ' + kind if kind else ''} at step {step}: {loss:.5f} ({levels})")

    def say(self, text: str) -> None:
        """A message above the progress line."""
        self._bar.clear()
        logger.info("%s", text)

    def close(self) -> None:
        """Finish the line."""
        self.flush()
        self._bar.close()

    def summary(self, names: Names, saved: Sequence[Path], usage: str) -> str:
        """Draw the loss plot and describe what the run left behind."""
        rows = [("results", ", ".join(str(path) for path in saved))]
        seconds = time.monotonic() - self._started
        if self.losses:
            plot = names.beside("_loss.png")
            plot_losses(plot, self.steps, self.losses, self.validation, names.base or "training")
            tail = self.losses[-max(1, len(self.losses) // 10) :]
            first = self.losses[: max(1, len(self.losses) // 10)]
            rows += [
                ("steps", f"{self.state.step} in {seconds:.0f} s"),
                ("loss", f"{sum(first) / len(first):.5f} at first, {sum(tail) / len(tail):.5f} at last"),
                ("loss plot", str(plot)),
            ]
        if len(self.validation) > 1:
            before, after = self.validation[0][1], self.validation[-1][1]
            change = (after - before) / before
            rows.append(("validation", f"{before:.5f} before, {after:.5f} after ({change:+.1%})"))
        if self.events.path is not None:
            rows.append(("event log", str(self.events.path)))
        rows.append(("use it", usage))
        return table("done", rows)
