"""Denoising loops."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError
from library.diffusion import ddpm

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy latents, time of the batch) -> prediction

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


def make_scheduler(name: str, *, velocity: bool = False, zero_terminal: bool = False) -> Any:
    """diffusers' scheduler for a sampler name, on the training schedule.

    Args:
        name: of the sampler.
        velocity: whether the model predicts the velocity.
        zero_terminal: whether it was trained with `--zero_terminal_snr`; samplers then start at the last timestep.

    Raises:
        UserError: unknown name.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise UserError("--sample_sampler", name, f"expected one of {', '.join(SCHEDULERS)}")
    class_name, extra = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    if zero_terminal:
        if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class.__init__).parameters:
            ready = "ddim, ddpm, euler, euler_a, dpmsolver"
            raise UserError("--sample_sampler", name, f"cannot follow --zero_terminal_snr; use one of {ready}")
        extra = {**extra, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler_class(
        prediction_type="v_prediction" if velocity else "epsilon",
        num_train_timesteps=ddpm.NUM_TIMESTEPS,
        beta_start=ddpm.BETA_START,
        beta_end=ddpm.BETA_END,
        beta_schedule="scaled_linear",
        **extra,
    )


def run_scheduler(scheduler: Any, predict: Predict, noise: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Denoise unit noise [B, C, H, W] with a diffusers scheduler; ancestral noise comes from `generator`."""
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for time in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(latents, time), time.expand(latents.shape[0]))
        extra = {"generator": generator} if takes_generator else {}
        latents = scheduler.step(prediction, time, latents, **extra).prev_sample
    return latents


def run_euler_flow(predict: Predict, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler steps along descending noise levels `sigmas` [steps + 1], from 1 to 0; `predict` gives the velocity."""
    latents = noise
    for now, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        velocity = predict(latents, torch.full((latents.shape[0],), now, device=latents.device))
        latents = latents + (following - now) * velocity.float()
    return latents
