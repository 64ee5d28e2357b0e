"""From a prediction to one loss per sample."""

from torch import Tensor

from library.batch import StepInputs


def sample_losses(prediction: Tensor, inputs: StepInputs) -> Tensor:
    """Per-sample loss [B], float32.

    Order: squared error in float32, weight of the noise level, mean over channels and pixels, weight of the sample.
    """
    target = inputs.target
    error = (prediction.float() - target.float()).square().flatten(1)
    if inputs.weight is not None:
        error = error * inputs.weight.to(error.device)[:, None]
    return error.mean(dim=1) * inputs.batch.loss_weights.to(error.device)
