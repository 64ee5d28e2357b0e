"""Options about sample images during training."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Samples: images made while training."""

    sample_prompts: str | None = option(None, help="file of prompts: txt, toml or json")
    sample_every_n_steps: int | None = option(None, help="make images every n steps")
    sample_every_n_epochs: int | None = option(None, help="make images every n epochs")
    sample_at_first: bool = option(False, help="make images before training")
    sample_sampler: str = option(
        "ddim",
        help="sampling method",
        choices=(
            "ddim",
            "pndm",
            "lms",
            "euler",
            "euler_a",
            "heun",
            "dpm_2",
            "dpm_2_a",
            "dpmsolver",
            "dpmsolver++",
            "dpmsingle",
            "k_lms",
            "k_euler",
            "k_euler_a",
            "k_dpm_2",
            "k_dpm_2_a",
        ),
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            0, sample_every_n_steps=self.sample_every_n_steps, sample_every_n_epochs=self.sample_every_n_epochs
        )
        wanted = self.sample_at_first or self.sample_every_n_steps or self.sample_every_n_epochs
        if wanted and self.sample_prompts is None:
            yield Problem("--sample_prompts", "is needed for sample images")
