"""The training loop: windows, the order of events, and the end. Knows nothing of models or files."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.base.errors import UserError
from library.base.randomness import seeded_globals
from library.batch import Conditioning, StepInputs, TrainBatch
from library.data.attributes import preserved
from library.data.loader import Window
from library.diffusion.process import per_sample
from library.options.state import StateOptions
from library.training.control import Control, Orders
from library.training.session import Session
from library.training.state import TrainState

Number = float | Tensor  # a tensor stays on the device until it is shown

# orders that a run can be without the means for -> what it lacks
_NEEDED = {"sample": "no --sample_prompts", "eval": "no validation images", "save": "", "save_state": ""}
_MAX_SKIPPED = 50  # steps without numbers in a row, after which skipping them is no remedy
_MAX_SKIPS = 40  # halvings of the fp16 loss scale after which no finite gradient can be hoped for


class Trainer:
    """Runs a session to its end."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.stopped: Orders | None = None  # what ended the run before its last step
        self._skipped = 0  # steps in a row that were left out
        self._brought: Tensor | None = None  # orders of the last sum over processes, and of the one before
        self._heard: Tensor | None = None

    def run(self) -> TrainState:
        """Train until the state has all its steps, or somebody stops it (`stopped`)."""
        s = self.session
        s.task.on_train_start()
        s.task.on_epoch_start()
        s.services.train_start(s.state)
        with s.control.listening():
            while not s.state.finished and self.stopped is None:
                self._epoch()
        if self.stopped is None:
            s.services.train_end(s.state)
        s.progress.close()
        return s.state

    def _epoch(self) -> None:
        """What is left of the current epoch."""
        s = self.session
        s.task.on_epoch_start()
        ended = True
        for window, batches in self._read(
            s.data.windows(s.state.epoch, start=s.state.batch_in_epoch, step=s.state.step)
        ):
            loss, values = self.train_window(window, batches)
            s.state.advance(window)
            s.progress.step_end(loss, values)
            s.services.step_end(s.state)
            self.obey(self._orders())
            ended = window.is_last
            if s.state.finished or self.stopped is not None:
                break
        if ended and self.stopped is None:
            s.progress.epoch_end(s.state.epoch)
            s.services.epoch_end(s.state)
            if not s.state.finished:
                s.state.next_epoch()

    def obey(self, orders: Orders) -> None:
        """Do at a boundary between two steps what was asked for; every process does the same."""
        s = self.session
        while True:
            if orders.rate is not None:
                s.optimizer.set_rate(orders.rate)
                s.progress.say(f"learning rate set to {orders.rate:g} from step {s.state.step} on")
            for verb in ("save", "save_state", "sample", "eval"):
                if verb in orders.verbs and not s.services.ordered(verb, s.state) and s.processes.is_main:
                    s.progress.say(f"{verb}: nothing to do ({_NEEDED[verb]})")
            if orders.stops:
                self.stopped = orders
                return
            if "pause" not in orders.verbs:
                return
            if s.processes.is_main:
                s.control.wait_for_resume(s.state.step)
            s.processes.wait_for_all()
            orders = Control.understood(s.processes.sum_values(s.control.outgoing().to(s.processes.device)).cpu())

    def _orders(self) -> Orders:
        """What all processes were told: with several, what the sum of the last step but one brought."""
        s = self.session
        if s.processes.world_size == 1:
            s.control.poll(s.state.step)
            return Control.understood(s.control.outgoing())
        orders = Orders() if self._heard is None else Control.understood(self._heard.cpu())
        self._heard = self._brought
        return orders

    def _sum(self, loss: Tensor) -> Tensor:
        """The loss over all processes; orders travel with it."""
        s = self.session
        if s.processes.world_size == 1:
            return loss
        s.control.poll(s.state.step)
        summed = s.processes.sum_values(torch.cat((loss.double().view(1), s.control.outgoing().to(loss.device))))
        self._brought = summed[1:]
        return summed[0].float()

    def train_window(self, window: Window, batches: Sequence[TrainBatch]) -> tuple[Tensor, dict[str, Number]]:
        """One optimizer step: (mean loss on the device, values to log)."""
        for _ in range(_MAX_SKIPS):
            total = torch.zeros((), device=self.session.processes.device)
            made = [self.session.inputs.assemble(batch) for batch in batches]
            losses = [self.backward(inputs, window) for inputs in made]
            for loss in losses:
                total += loss
            values = self.update(made, losses)
            if values is not None:
                return self._sum(total), values
        raise UserError("--mixed_precision", "fp16", "gradients stay infinite at every loss scale; use bf16 or no")

    def backward(self, inputs: StepInputs, window: Window) -> Tensor:
        """Gradients of one micro-step; returns its share of the window's mean loss."""
        s = self.session
        s.task.on_step_start()
        with seeded_globals(inputs.module_seed):
            loss = self.losses(inputs).mean()
            s.optimizer.backward(loss / window.count)
        if s.recorder is not None:
            number = s.state.micro_step + inputs.batch.ordinal - window.first
            s.recorder.write(number, inputs, float(loss.detach()), s.optimizer.learning_rates())
        return loss.detach() / window.count

    def losses(self, inputs: StepInputs) -> Tensor:
        """Per-sample losses [B]: a function of weights and inputs alone; training, validation and replay share it."""
        s = self.session
        conditioning = s.conditioning.get(inputs.batch.captions, inputs.batch.conditioning)
        with s.autocast():
            prediction = s.task.predict(inputs, conditioning)
            if any(kept := preserved(inputs.batch.attributes)):
                inputs = self._with_own_target(inputs, conditioning, kept)
        return s.criterion(prediction, inputs)

    def _with_own_target(self, inputs: StepInputs, conditioning: Conditioning, kept: Sequence[bool]) -> StepInputs:
        """Inputs whose target is the untrained model's prediction where an image asks for it."""
        with torch.no_grad():
            own = self.session.task.predict_untrained(inputs, conditioning)
        chosen = per_sample(torch.tensor(kept, device=own.device), own)
        return replace(inputs, target=torch.where(chosen, own.float(), inputs.target))

    def update(self, made: Sequence[StepInputs], losses: Sequence[Tensor]) -> dict[str, Number] | None:
        """Step the optimizer; None when the fp16 scaler skipped it and nothing may advance.

        Args:
            made: inputs of this process's micro-steps, for the case that something is wrong with them.
            losses: their shares of the mean loss.
        """
        s = self.session
        s.processes.sum_gradients(s.optimizer.parameters)
        s.task.on_gradients()
        rates = s.optimizer.learning_rates()
        norm = s.optimizer.clip()
        values: dict[str, Number] = {f"lr/{name}": rate for name, rate in rates.items()}
        # a loss scaler looks itself; without one, a single look at the norm keeps NaN out of all weights
        if s.optimizer.scaler is None and not bool(torch.isfinite(norm)):
            self._no_numbers(made, losses)
            return {**values, "norm/grad": norm, "skipped": 1.0}
        self._skipped = 0
        if not s.optimizer.step():
            return None
        logged = s.task.on_parameters_updated()
        s.weights.updated()
        return {**values, "norm/grad": norm, **logged}

    def _no_numbers(self, made: Sequence[StepInputs], losses: Sequence[Tensor]) -> None:
        """Gradients are no numbers: the weights are still what they were.

        Raises:
            UserError: unless such steps are to be skipped, and when too many of them come in a row.
        """
        s = self.session
        step = s.state.step + 1
        keys = ", ".join(key for inputs in made for key in inputs.batch.image_keys)
        if s.plan.options[StateOptions].nan_policy == "skip" and self._skipped < _MAX_SKIPPED:
            self._skipped += 1
            s.optimizer.skip()
            s.progress.say(f"step {step}: gradients are no numbers, skipped (images: {keys})")
            return
        where = ""
        if s.processes.is_main:
            try:
                folder = s.failures.write(step, made, [float(loss) for loss in losses])
                where = f"; its inputs are in {folder}"
            except OSError as error:
                where = f"; its inputs could not be written ({error.strerror or error})"
        message = (
            f"gradients are no numbers (NaN or infinite), images: {keys}{where}; nothing was changed by this step. "
            "Lower the learning rate, use --mixed_precision bf16 or no, or leave such steps out with --nan_policy skip"
        )
        raise UserError(f"step {step}", message=message)

    def _read(self, windows: Iterator[Window]) -> Iterator[tuple[Window, list[TrainBatch]]]:
        """The windows with their batches, telling the progress line how long each was waited for."""
        started = time.perf_counter()
        for window in windows:
            batches = list(window.batches)
            self.session.progress.waited(time.perf_counter() - started)
            yield window, batches
            started = time.perf_counter()
