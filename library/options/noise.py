"""Options about the noise that is added."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import above, at_least
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Noise: what is added to latents, and how much."""

    noise_offset: float | None = option(None, help="shift the noise of each channel by up to this, about 0.1")
    noise_offset_random_strength: bool = option(False, help="draw the offset between 0 and the given one")
    multires_noise_iterations: int | None = option(None, help="add noise of this many coarser sizes, about 6 to 10")
    multires_noise_discount: float = option(0.3, help="strength of each coarser noise relative to the last")
    ip_noise_gamma: float | None = option(None, help="disturb the noisy input but not the target, about 0.1")
    ip_noise_gamma_random_strength: bool = option(False, help="draw that strength between 0 and the given one")
    adaptive_noise_scale: float | None = option(None, help="add this much of the latents' mean to the offset")
    zero_terminal_snr: bool = option(False, help="change the schedule so that the last step is noise alone")
    min_timestep: int | None = option(None, help="earliest time that is trained, 0 to 999")
    max_timestep: int | None = option(None, help="end of the times that are trained, 1 to 1000")
    num_timestep_buckets: int | None = option(
        None, help="draw times evenly: of every n images, one from each n-th part of the distribution"
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            yield Problem("--adaptive_noise_scale", "needs --noise_offset")
        yield from at_least(0, multires_noise_iterations=self.multires_noise_iterations)
        yield from at_least(1, num_timestep_buckets=self.num_timestep_buckets)
        yield from above(0, multires_noise_discount=self.multires_noise_discount)
        for name in ("min_timestep", "max_timestep"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1000:
                yield Problem(f"--{name}", "must be between 0 and 1000", value)
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if low >= high:
            yield Problem("--min_timestep", f"must be below --max_timestep ({high})", low)
