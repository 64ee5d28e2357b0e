"""Inputs of a micro-step, made by hand."""

import torch

from library.batch import ItemAddress, StepInputs, TrainBatch


def train_batch(size: int = 1, side: int = 64, *, masks: bool = False, **more) -> TrainBatch:
    """A batch of square images that nothing else is known of."""
    return TrainBatch(
        items=[ItemAddress(0, 0, n, f"{n}.png", 0, 1) for n in range(size)],
        captions=[f"caption {n}" for n in range(size)],
        ordinal=0,
        loss_weights=torch.linspace(0.5, 1.0, size),
        images=None,
        latents=None,
        original_sizes=torch.full((size, 2), side),
        crop_top_lefts=torch.zeros(size, 2, dtype=torch.long),
        target_sizes=torch.full((size, 2), side),
        pixel_crops=torch.zeros(size, 4, dtype=torch.long),
        flipped=[False] * size,
        subsets=["a"] * size,
        masks=torch.rand(size, side, side) if masks else None,
        **more,
    )


def step_inputs(size: int = 1, latent: tuple[int, int, int] = (4, 8, 8), *, masks: bool = False) -> StepInputs:
    """Random inputs with a weight for each sample."""
    latents, noise = torch.randn(size, *latent), torch.randn(size, *latent)
    return StepInputs(
        batch=train_batch(size, latent[-1] * 8, masks=masks),
        latents=latents,
        noise=noise,
        noisy=latents + noise,
        timesteps=torch.linspace(100, 900, size),
        sigmas=None,
        target=noise,
        weight=torch.linspace(0.5, 2.0, size),
        module_seed=1,
    )
