"""Options of control networks."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, share
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions:
    """ControlNet: the control model."""

    controlnet_model_name_or_path: str | None = option(
        None, help="control model to start from; made from the base model when not given"
    )
    control_net_lr: float = option(1e-4, help="learning rate of the control model")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, control_net_lr=self.control_net_lr)


@dataclass(frozen=True, kw_only=True)
class LLLiteOptions:
    """ControlNet-LLLite: small control modules inside the denoiser."""

    cond_emb_dim: int | None = option(None, help="width of the embedded control image")
    network_dim: int | None = option(None, help="width of the control modules")
    network_dropout: float | None = option(None, help="share of the modules' activations dropped while training")
    network_weights: str | None = option(None, help="LLLite file to start from")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, cond_emb_dim=self.cond_emb_dim, network_dim=self.network_dim)
        yield from share(network_dropout=self.network_dropout)
