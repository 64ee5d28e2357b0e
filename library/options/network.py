"""Options of the adapter that is trained."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import above, at_least, exclusive, share
from library.options.schema import option

DIALECTS = ("comfy", "diffusers")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Network: the adapter that is trained."""

    network_module: str | None = option(
        None, help="Python module that makes the adapter; depends on the model when not given"
    )
    network_dim: int | None = option(None, help="rank of the adapter")
    network_alpha: float = option(1, help="the adapter is scaled by alpha / rank")
    network_args: list[str] | None = option(None, help="key=value arguments of the module")
    network_dropout: float | None = option(None, help="share of the adapter's activations dropped while training")
    network_weights: str | None = option(None, help="adapter file to start from")
    network_train_unet_only: bool = option(False, help="train the denoiser's part only")
    network_train_text_encoder_only: bool = option(False, help="train the text encoders' part only")
    dim_from_weights: bool = option(False, help="take the ranks from --network_weights")
    scale_weight_norms: float | None = option(
        None, help="longest norm of an adapter weight; longer ones are scaled down"
    )
    base_weights: list[str] | None = option(None, help="adapter files merged into the model before training")
    base_weights_multiplier: list[float] | None = option(
        None, help="strength of each of --base_weights, 1 when not given"
    )
    save_also_as: str | None = option(
        None, help="further files beside each saved adapter, in the names of other programs: comfy, diffusers, or both"
    )
    unet_lr: float | None = option(None, help="learning rate of the denoiser's part")
    text_encoder_lr: list[float] | None = option(
        None, help="learning rate of the text encoders' part, or one per encoder"
    )

    @property
    def dialects(self) -> tuple[str, ...]:
        """What `--save_also_as` names."""
        return tuple(dict.fromkeys(name.strip() for name in (self.save_also_as or "").split(",") if name.strip()))

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, network_dim=self.network_dim)
        yield from at_least(0, unet_lr=self.unet_lr)
        yield from above(0, scale_weight_norms=self.scale_weight_norms)
        yield from share(network_dropout=self.network_dropout)
        yield from exclusive(self, "network_train_unet_only", "network_train_text_encoder_only")
        if self.dim_from_weights and self.network_weights is None:
            yield Problem("--dim_from_weights", "needs --network_weights")
        for name in self.dialects:
            if name not in DIALECTS:
                message = f"expected {' or '.join(DIALECTS)}, or both with a comma"
                yield Problem("--save_also_as", message, self.save_also_as)
        multipliers, files = len(self.base_weights_multiplier or ()), len(self.base_weights or ())
        if multipliers > files:
            message = f"{multipliers} values for {files} files in --base_weights"
            yield Problem("--base_weights_multiplier", message)
        for text in self.network_args or ():
            if "=" not in text:
                yield Problem("--network_args", "expected key=value", text)
