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
    cache_format: str = option(
        "npz",
        help="format of new cache files: npz is what other programs read, safetensors is half the size (bfloat16)",
        choices=("npz", "safetensors"),
    )
    verify_caches: bool = option(False, help="compare the checksums of all cache files before training")
    vae_sample: bool = option(False, help="draw latents from the VAE's distribution instead of taking its mode")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, vae_batch_size=self.vae_batch_size)
        if self.verify_caches and self.skip_cache_check:
            yield Problem("--verify_caches", "contradicts --skip_cache_check; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class TextCachingOptions:
    """Text caching: captions encoded once."""

    cache_text_encoder_outputs: bool = option(False, help="encode all captions before training, keep them in memory")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="keep the encoded captions in files beside the images"
    )
    cache_caption_variants: int | None = option(
        None, help="encode this many variants of each caption that is shuffled, has wildcards or drops tags"
    )
    text_encoder_batch_size: int | None = option(None, help="captions encoded at a time; the batch size when not given")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            1,
            text_encoder_batch_size=self.text_encoder_batch_size,
            cache_caption_variants=self.cache_caption_variants,
        )
        if self.cache_caption_variants is not None and not self.active:
            yield Problem("--cache_caption_variants", "needs --cache_text_encoder_outputs")

    @property
    def active(self) -> bool:
        """Whether encoded captions are kept at all; keeping them on disk implies it."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
