"""Options of training whole models."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, exclusive
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class TextEncoderTrainingOptions:
    """Text encoders: training them with the denoiser."""

    train_text_encoder: bool = option(False, help="train the text encoder too")
    learning_rate_te: float | None = option(None, help="learning rate of the text encoder; 0: not trained")
    learning_rate_te1: float | None = option(None, help="learning rate of the first text encoder")
    learning_rate_te2: float | None = option(None, help="learning rate of the second text encoder")
    learning_rate_te3: float | None = option(None, help="learning rate of the third text encoder")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(
            0,
            learning_rate_te=self.learning_rate_te,
            learning_rate_te1=self.learning_rate_te1,
            learning_rate_te2=self.learning_rate_te2,
            learning_rate_te3=self.learning_rate_te3,
        )


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions:
    """DreamBooth: what only train_db.py offers."""

    no_token_padding: bool = option(False, help="do not pad captions, as the first DreamBooth code did")
    stop_text_encoder_training: int | None = option(
        None, help="step after which the text encoder stays as it is; -1: never trained"
    )


@dataclass(frozen=True, kw_only=True)
class FusedUpdateOptions:
    """Fused updates: less memory for large trained models."""

    fused_optimizer_groups: int | None = option(
        None, help="split the optimizer into this many groups that update early"
    )
    blockwise_fused_optimizers: bool = option(False, help="one optimizer per block, updating during the backward pass")
    mem_eff_save: bool = option(False, help="save piece by piece, with little main memory")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, fused_optimizer_groups=self.fused_optimizer_groups)
        yield from exclusive(self, "blockwise_fused_optimizers", "fused_optimizer_groups")
