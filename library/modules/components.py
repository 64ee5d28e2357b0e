"""The loaded parts of one model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Need:
    """Which parts a run has to load, and in which number format."""

    denoiser: bool = True
    vae: bool = True
    text_encoders: bool = True
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # the denoiser may wait elsewhere while text encoders and VAE fill their caches on the device
    denoiser_device: torch.device | None = None
    # changes the empty denoiser or an empty text encoder, such as how it keeps its weights
    prepare_denoiser: Callable[[nn.Module], None] | None = None
    prepare_text_encoder: Callable[[nn.Module], None] | None = None

    @property
    def place_of_denoiser(self) -> torch.device:
        """Where the denoiser is loaded to."""
        return self.denoiser_device or self.device


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which member of a family a checkpoint is.

    Attributes:
        name: e.g. "v1", "dev", "schnell".
        base_model_version: value of `ss_base_model_version`.
        config: sizes read from the checkpoint.
        num_parameters: of each part that will be loaded, from the headers of its file.
    """

    name: str
    base_model_version: str
    config: Mapping[str, Any] = field(default_factory=dict)
    num_parameters: Mapping[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Components:
    """Loaded parts of one model; `denoiser` is the U-Net or transformer.

    A part that was not asked for is None (text encoders: an empty list or None entries).
    """

    denoiser: nn.Module | None
    vae: nn.Module | None
    text_encoders: list[nn.Module | None]
    variant: Variant
    source: Path
    # the same leaves under published names of which adapter keys are made
    published_denoiser: nn.Module | None = None
    published_text_encoders: list[nn.Module | None] = field(default_factory=list)

    @property
    def has_text_encoders(self) -> bool:
        """Whether any text encoder is loaded."""
        return any(encoder is not None for encoder in self.text_encoders)

    def freeze(self) -> None:
        """Make every part untrainable and put it into evaluation mode."""
        for module in (self.denoiser, self.vae, *self.text_encoders):
            if module is not None:
                module.requires_grad_(False)
                module.eval()
