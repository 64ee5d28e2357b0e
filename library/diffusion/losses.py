"""From a prediction to one loss per sample."""

from torch import Tensor
from torch.nn import functional

from library.batch import StepInputs


def sample_losses(prediction: Tensor, inputs: StepInputs) -> Tensor:
    """Per-sample loss [B], float32.

    Order: squared error in float32, weight of the noise level, mask, mean over channels and pixels, weight of the
    sample. The mean is over all pixels, so a small mask makes a small loss.
    """
    target = inputs.target
    error = (prediction.float() - target.float()).square()
    if inputs.weight is not None:
        error = error * inputs.weight.to(error.device).view(-1, *[1] * (error.ndim - 1))
    masks = inputs.batch.masks
    if masks is not None:
        # each latent pixel weighs as much as the part of its image pixels that the mask keeps
        error = error * functional.interpolate(masks[:, None], size=error.shape[-2:], mode="area").to(error.device)
    return error.flatten(1).mean(dim=1) * inputs.batch.loss_weights.to(error.device)
