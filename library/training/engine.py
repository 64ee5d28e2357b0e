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
from library.diffusion.losses import sample_losses
from library.diffusion.process import per_sample
from library.training.session import Session
from library.training.state import TrainState

Number = float | Tensor  # a tensor stays on the device until it is shown

_MAX_SKIPS = 40  # halvings of the fp16 loss scale after which no finite gradient can be hoped for


class Trainer:
    """Runs a session to its end."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run(self) -> TrainState:
        """Train until the state has all its steps."""
        s = self.session
        s.task.on_train_start()
        s.task.on_epoch_start()
        s.services.train_start(s.state)
        while not s.state.finished:
            s.task.on_epoch_start()
            windows = s.data.windows(s.state.epoch, start=s.state.batch_in_epoch, step=s.state.step)
            ended = True
            for window, batches in self._read(windows):
                loss, values = self.train_window(window, batches)
                s.state.advance(window)
                s.progress.step_end(loss, values)
                s.services.step_end(s.state)
                ended = window.is_last
                if s.state.finished:
                    break
            if ended:
                s.progress.epoch_end(s.state.epoch)
                s.services.epoch_end(s.state)
                if not s.state.finished:
                    s.state.next_epoch()
        s.services.train_end(s.state)
        s.progress.close()
        return s.state

    def train_window(self, window: Window, batches: Sequence[TrainBatch]) -> tuple[Tensor, dict[str, Number]]:
        """One optimizer step: (mean loss on the device, values to log)."""
        for _ in range(_MAX_SKIPS):
            total = torch.zeros((), device=self.session.processes.device)
            for batch in batches:
                total += self.backward(self.session.inputs.assemble(batch), window)
            values = self.update()
            if values is not None:
                return self.session.processes.sum_values(total), values
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
        return sample_losses(prediction, inputs)

    def _with_own_target(self, inputs: StepInputs, conditioning: Conditioning, kept: Sequence[bool]) -> StepInputs:
        """Inputs whose target is the untrained model's prediction where an image asks for it."""
        with torch.no_grad():
            own = self.session.task.predict_untrained(inputs, conditioning)
        chosen = per_sample(torch.tensor(kept, device=own.device), own)
        return replace(inputs, target=torch.where(chosen, own.float(), inputs.target))

    def update(self) -> dict[str, Number] | None:
        """Step the optimizer; None when the fp16 scaler skipped it and nothing may advance."""
        s = self.session
        s.processes.sum_gradients(s.optimizer.parameters)
        s.task.on_gradients()
        rates = s.optimizer.learning_rates()
        norm = s.optimizer.clip()
        if not s.optimizer.step():
            return None
        values: dict[str, Number] = {f"lr/{name}": rate for name, rate in rates.items()}
        return {**values, "norm/grad": norm, **s.task.on_parameters_updated()}

    def _read(self, windows: Iterator[Window]) -> Iterator[tuple[Window, list[TrainBatch]]]:
        """The windows with their batches, telling the progress line how long each was waited for."""
        started = time.perf_counter()
        for window in windows:
            batches = list(window.batches)
            self.session.progress.waited(time.perf_counter() - started)
            yield window, batches
            started = time.perf_counter()
