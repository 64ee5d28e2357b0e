"""From a prediction to one loss per sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from library.batch import StepInputs
from library.diffusion.process import NoiseProcess, per_sample


def element_losses(kind: str, prediction: Tensor, target: Tensor, thresholds: Tensor | None) -> Tensor:
    """Distance of each element, float32.

    `l2` d^2; `l1` |d|; `huber` 2c * (sqrt(d^2 + c^2) - c); `smooth_l1` 2 * (sqrt(d^2 + c^2) - c): the pseudo-Huber
    distances (Charbonnier et al., 1997), quadratic below c and linear above.

    Args:
        kind: of the distance.
        prediction: [B, ...].
        target: [B, ...].
        thresholds: c of each sample [B], for the last two.
    """
    difference = prediction.float() - target.float()
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    assert thresholds is not None
    c = per_sample(thresholds.to(difference.device), difference)
    distance = 2 * ((difference.square() + c.square()).sqrt() - c)
    return c * distance if kind == "huber" else distance


def huber_thresholds(schedule: str, c: float, scale: float, timesteps: Tensor, noise_to_signal: Tensor) -> Tensor:
    """Threshold of each sample [B].

    `constant` c; `exponential` c^(t/1000), from 1 to c; `snr` (1 - c) / (1 + r)^2 + c with the noise-to-signal ratio r
    (Khrapov et al., "Improving Diffusion Models' Data-Corruption Resistance using Scheduled Pseudo-Huber Loss", 2024);
    each times `scale`.

    Args:
        schedule: name.
        c: the constant.
        scale: factor of every threshold.
        timesteps: [B] in 0..1000.
        noise_to_signal: [B].
    """
    if schedule == "constant":
        return torch.full_like(timesteps, c * scale, dtype=torch.float32)
    if schedule == "exponential":
        return torch.exp(math.log(c) / 1000 * timesteps.float()) * scale
    return ((1 - c) / (1 + noise_to_signal).square() + c) * scale


@dataclass(frozen=True, kw_only=True)
class SampleLoss:
    """Losses of samples.

    Attributes:
        process: tells how much noise a sample has.
        kind: see `element_losses`.
        schedule: see `huber_thresholds`.
        c: see there.
        scale: see there.
    """

    process: NoiseProcess
    kind: str = "l2"
    schedule: str = "snr"
    c: float = 0.1
    scale: float = 1.0

    def __call__(self, prediction: Tensor, inputs: StepInputs) -> Tensor:
        """Per-sample loss [B], float32.

        Order: distance in float32, weight of the noise level, mask, mean over channels and pixels, weight of the
        sample. The mean is over all pixels, so a small mask makes a small loss.
        """
        thresholds = None
        if self.kind in ("huber", "smooth_l1"):
            ratio = self.process.noise_to_signal(inputs.timesteps, inputs.sigmas)
            thresholds = huber_thresholds(self.schedule, self.c, self.scale, inputs.timesteps, ratio)
        error = element_losses(self.kind, prediction, inputs.target, thresholds)
        if inputs.weight is not None:
            error = error * per_sample(inputs.weight.to(error.device), error)
        masks = inputs.batch.masks
        if masks is not None:
            # each latent pixel weighs as much as the part of its image pixels that the mask keeps
            kept = functional.interpolate(masks[:, None], size=error.shape[-2:], mode="area")
            error = error * kept.to(error.device)
        return error.flatten(1).mean(dim=1) * inputs.batch.loss_weights.to(error.device)
