"""Options of the optimizer."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import at_least, exclusive
from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer: how weights are updated."""

    optimizer_type: str = option("", help="name of the optimizer, or package.module.ClassName; AdamW when not given")
    use_8bit_adam: bool = option(False, help="AdamW with 8-bit states", deprecated="--optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, help="the Lion optimizer", deprecated="--optimizer_type Lion")
    learning_rate: float = option(2.0e-6, help="learning rate of every part without its own")
    max_grad_norm: float = option(1.0, help="longest gradient; 0: not clipped")
    optimizer_args: list[str] | None = option(None, help="key=value arguments of the optimizer")
    fused_backward_pass: bool = option(False, help="update each weight during the backward pass: less memory")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        yield from exclusive(self, "use_8bit_adam", "use_lion_optimizer")
        for name in ("use_8bit_adam", "use_lion_optimizer"):
            yield from exclusive(self, name, "optimizer_type", "both name the optimizer")
        if self.fused_backward_pass and self.name != "adafactor":
            yield Problem("--fused_backward_pass", "needs --optimizer_type Adafactor")
        for text in self.optimizer_args or ():
            if "=" not in text:
                yield Problem("--optimizer_args", "expected key=value", text)

    @property
    def name(self) -> str:
        """The optimizer in lower case, whichever flag names it."""
        if self.use_8bit_adam:
            return "adamw8bit"
        return "lion" if self.use_lion_optimizer else (self.optimizer_type or "AdamW").lower()
