"""Options of the loss."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import above
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss: the distance between prediction and target."""

    loss_type: str = option("l2", help="kind of distance", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr", help="how the Huber constant follows the time", choices=("constant", "exponential", "snr")
    )
    huber_c: float = option(0.1, help="Huber constant: where the loss turns from square to linear")
    huber_scale: float = option(1.0, help="factor of the Huber constant")
    masked_loss: bool = option(False, help="weight the loss by the masks in --conditioning_data_dir")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from above(0, huber_c=self.huber_c, huber_scale=self.huber_scale)


@dataclass(frozen=True, kw_only=True)
class SnrLossOptions:
    """Loss weights by noise level: for models with a discrete noise schedule."""

    min_snr_gamma: float | None = option(None, help="cap the weight of low-noise times, 5 is usual")
    scale_v_pred_loss_like_noise_pred: bool = option(False, help="weight a velocity loss as a noise loss would be")
    v_pred_like_loss: float | None = option(None, help="add a velocity-like loss of this weight")
    debiased_estimation_loss: bool = option(False, help="weight by the inverse root of the signal-to-noise ratio")
    weighted_captions: bool = option(False, help="captions may weight words, as in (word:1.2)")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from above(0, min_snr_gamma=self.min_snr_gamma)
