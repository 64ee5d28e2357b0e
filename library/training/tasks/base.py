"""What a training task is to the engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from library.batch import Conditioning, StepInputs


class TrainingTask(Protocol):
    """What is trained and how it is saved; one instance per run, holding the trainable modules."""

    def param_groups(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Optimizer groups and their log names. Raises UserError when nothing would be trained."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What a training state has to hold, by name."""
        ...

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        ...

    def on_train_start(self) -> None:
        """Called once before the first step."""
        ...

    def on_epoch_start(self) -> None:
        """Called before each epoch."""
        ...

    def on_step_start(self) -> None:
        """Called before each micro-step."""
        ...

    def predict(self, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """Prediction [B, C, H, W] for a micro-step."""
        ...

    def predict_untrained(self, inputs: StepInputs, conditioning: Conditioning) -> Tensor:
        """As `predict`, by the model as it was before training."""
        ...

    def on_gradients(self) -> None:
        """Called after the last backward of a step, before clipping."""
        ...

    def on_parameters_updated(self) -> dict[str, float]:
        """Called after the optimizer's step; returns values to log."""
        ...

    def evaluating(self) -> Any:
        """Context in which dropouts of trained modules rest."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the result."""
        ...
