"""Denoising loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError
from library.diffusion import ddpm

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, time of the batch) -> prediction
Tick = Callable[[float], object]  # told of the share of all steps that was just done


def no_tick(share: float) -> None:
    """Nobody looks on."""
    del share


# sampler name -> (diffusers scheduler class, extra arguments)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "k_lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "k_euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "k_euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "k_dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "k_dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
# those that can begin where nothing of the image is left
ZERO_TERMINAL = ("ddim", "ddpm", "euler", "k_euler", "euler_a", "k_euler_a", "dpmsolver", "dpmsolver++")


def sampler_names(*, zero_terminal: bool = False) -> tuple[str, ...]:
    """Names that samples can be made with; `zero_terminal` as in `make_scheduler`."""
    return ZERO_TERMINAL if zero_terminal else tuple(SCHEDULERS)


def make_scheduler(name: str, *, velocity: bool = False, zero_terminal: bool = False) -> Any:
    """diffusers' scheduler for a sampler name, on the training schedule.

    Args:
        name: of the sampler.
        velocity: whether the model predicts the velocity.
        zero_terminal: whether it was trained with `--zero_terminal_snr`; samplers then start at the last timestep.

    Raises:
        UserError: unknown name.
    """
    if name not in SCHEDULERS:
        raise UserError("--sample_sampler", name, f"expected one of {', '.join(SCHEDULERS)}")
    if zero_terminal and name not in ZERO_TERMINAL:
        ready = ", ".join(ZERO_TERMINAL)
        raise UserError("--sample_sampler", name, f"cannot follow --zero_terminal_snr; use one of {ready}")
    import diffusers

    class_name, extra = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    if zero_terminal:
        extra = {**extra, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler_class(
        prediction_type="v_prediction" if velocity else "epsilon",
        num_train_timesteps=ddpm.NUM_TIMESTEPS,
        beta_start=ddpm.BETA_START,
        beta_end=ddpm.BETA_END,
        beta_schedule="scaled_linear",
        **extra,
    )


def run_scheduler(
    scheduler: Any,
    predict: Predict,
    noise: Tensor,
    steps: int,
    generator: torch.Generator,
    tick: Tick = no_tick,
) -> Tensor:
    """Denoise unit noise with a diffusers scheduler.

    Args:
        scheduler: made by `make_scheduler`.
        predict: the model.
        noise: [B, C, H, W].
        steps: denoising steps.
        generator: of ancestral noise.
        tick: is told of every call of the model, which some schedulers make several of in a step.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for time in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(latents, time), time.expand(latents.shape[0]))
        extra = {"generator": generator} if takes_generator else {}
        latents = scheduler.step(prediction, time, latents, **extra).prev_sample
        tick(1 / len(scheduler.timesteps))
    return latents


def run_euler_flow(predict: Predict, noise: Tensor, sigmas: Tensor, tick: Tick = no_tick) -> Tensor:
    """Euler steps.

    Args:
        predict: gives the velocity.
        noise: [B, C, H, W].
        sigmas: descending noise levels [steps + 1], from 1 to 0.
        tick: is told of every step.
    """
    latents = noise
    for now, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        velocity = predict(latents, torch.full((latents.shape[0],), now, device=latents.device))
        latents = latents + (following - now) * velocity.float()
        tick(1 / (len(sigmas) - 1))
    return latents
