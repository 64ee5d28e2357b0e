"""Options about values that are computed once and kept."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """Latent caching: images encoded once."""

    cache_latents: bool = option(False, help="encode all images before training and keep the latents in memory")
    vae_batch_size: int = option(1, help="images encoded at a time")
    cache_latents_to_disk: bool = option(False, help="keep the latents in files beside the images")
    skip_cache_check: bool = option(
        False, help="trust existing cache files without opening them", aliases=("skip_latents_validity_check",)
    )
    vae_sample: bool = option(False, help="draw latents from the VAE's distribution instead of taking its mode")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, vae_batch_size=self.vae_batch_size)


@dataclass(frozen=True, kw_only=True)
class TextCachingOptions:
    """Text caching: captions encoded once."""

    cache_text_encoder_outputs: bool = option(False, help="encode all captions before training, keep them in memory")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="keep the encoded captions in files beside the images"
    )
    text_encoder_batch_size: int | None = option(None, help="captions encoded at a time; the batch size when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, text_encoder_batch_size=self.text_encoder_batch_size)

    @property
    def active(self) -> bool:
        """Whether encoded captions are kept at all; keeping them on disk implies it."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
