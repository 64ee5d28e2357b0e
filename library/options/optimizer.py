"""Options of the optimizer."""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.arguments import argument_problems, parse_arguments
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
    fused_backward_pass: bool = option(
        False, help="update each weight during the backward pass: less memory; gradients are not clipped then"
    )

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        yield from exclusive(self, "use_8bit_adam", "use_lion_optimizer")
        for name in ("use_8bit_adam", "use_lion_optimizer"):
            yield from exclusive(self, name, "optimizer_type", "both name the optimizer")
        if self.fused_backward_pass and self.name != "adafactor":
            yield Problem("--fused_backward_pass", "needs --optimizer_type Adafactor")
        yield from argument_problems(self.optimizer_args, "--optimizer_args")

    @property
    def shown_name(self) -> str:
        """The optimizer as the user wrote it, whichever flag names it."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        return "Lion" if self.use_lion_optimizer else (self.optimizer_type or "AdamW")

    @property
    def name(self) -> str:
        """The optimizer in lower case, whichever flag names it."""
        return self.shown_name.lower()

    @property
    def sets_own_rate(self) -> bool:
        """Whether Adafactor works out its rate itself: `relative_step`, which `warmup_init=True` needs.

        Raises:
            UserError: arguments that cannot be read.
        """
        if self.name != "adafactor":
            return False
        arguments = parse_arguments(self.optimizer_args, "--optimizer_args")
        return bool(arguments.get("relative_step", True) or arguments.get("warmup_init"))

    @property
    def finds_rate(self) -> bool:
        """Whether it finds the size of its steps and multiplies it with the learning rate."""
        return self.name.startswith("dadapt") or self.name == "prodigy"

    @property
    def is_schedule_free(self) -> bool:
        """Whether it averages weights instead of following a schedule."""
        return self.name.endswith("schedulefree")
