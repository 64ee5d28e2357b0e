"""Tiny models that make images, loaded once."""

import pytest
import torch

from library.base.lazy import resolve
from library.modules.components import Need
from library.sampling.runner import ImageModel
from library.train_util import load_family, parse_options
from library.training.conditioning import ConditioningSource
from library.training.plan import autocast_context


@pytest.fixture(scope="session")
def image_model(inputs):
    """Family name (and flags of its training) -> what makes images, and the family's defaults of prompts."""
    made = {}

    def make(name, *flags):
        if (name, flags) not in made:
            family = load_family(name)
            options = parse_options(name, "network", [*inputs.base(name), "--output_dir", "o", *flags])
            strategies = resolve(family.strategies)(options, resolve(family.inspect)(options))
            components = resolve(family.load)(options, Need())
            components.freeze()
            device = torch.device("cpu")
            plain = autocast_context(device, torch.float32)
            encoders = components.text_encoders
            source = ConditioningSource(strategies, encoders, [False] * len(encoders), None, device, plain)
            model = ImageModel(
                maker=strategies.denoising,
                denoiser=components.denoiser,
                vae=components.vae,
                condition=source.for_prompt,
                device=device,
                autocast=plain,
            )
            made[name, flags] = model, strategies.denoising.sample_defaults
        return made[name, flags]

    return make
