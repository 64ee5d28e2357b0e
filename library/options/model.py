"""Options naming the base model."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model: the base model and how its parts are read."""

    pretrained_model_name_or_path: str | None = option(None, help="base model: checkpoint file")
    v2: bool = option(False, help="the model is Stable Diffusion 2.x")
    v_parameterization: bool = option(False, help="the model predicts velocity instead of noise")
    tokenizer_cache_dir: str | None = option(None, help="folder that keeps tokenizers for work without a network")
    vae: str | None = option(None, help="another VAE to use instead of the one in the model")
    clip_skip: int | None = option(None, help="take the output of the n-th CLIP layer counted from the end")
    max_token_length: int | None = option(
        None, help="longest caption in CLIP tokens; 75 when not given", choices=(150, 225)
    )
    no_half_vae: bool = option(False, help="run the VAE in float32 even when training in half precision")
    disable_mmap_load_safetensors: bool = option(False, help="read model files into memory instead of mapping them")
    lowram: bool = option(False, help="load models straight to the device, for machines with little main memory")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, clip_skip=self.clip_skip)


@dataclass(frozen=True, kw_only=True)
class InpaintingOptions:
    """Inpainting: models that see a mask and the kept part of the image."""

    train_inpainting: bool = option(False, help="train a 9-channel model on masks drawn per step")
