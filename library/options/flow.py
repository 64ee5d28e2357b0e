"""Options of flow-matching models."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import above
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Flow weighting: how much each noise level counts."""

    weighting_scheme: str = option(
        "uniform",
        help="density of noise levels (logit_normal, mode) or weight of the loss (sigma_sqrt, cosmap)",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(0.0, help="mean of logit_normal")
    logit_std: float = option(1.0, help="standard deviation of logit_normal")
    mode_scale: float = option(1.29, help="strength of mode")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from above(0, logit_std=self.logit_std)


@dataclass(frozen=True, kw_only=True)
class FlowSamplingOptions:
    """Flow times: which noise levels are trained."""

    timestep_sampling: str = option(
        "sigma",
        help="how noise levels are drawn",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )
    sigmoid_scale: float = option(1.0, help="spread of sigmoid, shift and flux_shift")
    model_prediction_type: str = option(
        "sigma_scaled", help="how the model's output is read", choices=("raw", "additive", "sigma_scaled")
    )
    discrete_flow_shift: float = option(3.0, help="shift towards noise, for shift and for the Euler schedule")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from above(0, sigmoid_scale=self.sigmoid_scale, discrete_flow_shift=self.discrete_flow_shift)


@dataclass(frozen=True, kw_only=True)
class TimestepViewOptions:
    """Preview of noise levels: see what would be drawn, and how much it would count, instead of training."""

    show_timesteps: str | None = option(
        None,
        help="show the drawn noise levels and their weights, as text or also as a PNG among the results, then stop",
        choices=("console", "image"),
    )
    show_timesteps_resolution: str | None = option(
        None, help='image size of the preview, "size" or "width,height"; that of the first dataset when not given'
    )
    show_timesteps_offset: float = option(0.0, help="shift of the previewed distribution in logit space")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        if self.show_timesteps_resolution is not None and self.resolution is None:
            message = 'expected "size" or "width,height" in pixels, for example 1024 or 1024,768'
            yield Problem("--show_timesteps_resolution", message, self.show_timesteps_resolution)

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(width, height) in pixels, or None when it is not given or cannot be read."""
        parts = (self.show_timesteps_resolution or "").split(",")
        if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            return None
        return int(parts[0]), int(parts[-1])
