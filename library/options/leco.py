"""Options of LECO: adapters trained from prompts alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class LecoOptions:
    """LECO: concepts changed by prompts, without images."""

    prompts_file: str = option(REQUIRED, help="TOML or YAML file with the prompt pairs")
    max_denoising_steps: int = option(40, help="steps of the partial denoising")
    leco_denoise_guidance_scale: float = option(3.0, help="guidance while denoising")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, max_denoising_steps=self.max_denoising_steps)
