"""Options choosing the attention implementation."""

from collections.abc import Iterator
from dataclasses import dataclass

from library.base.errors import Problem
from library.options.ranges import exclusive
from library.options.schema import OptionSet, option


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention: which implementation computes it."""

    mem_eff_attn: bool = option(False, help="attention in small pieces, for cards without a fused kernel")
    xformers: bool = option(False, help="attention of the xformers package")
    sdpa: bool = option(False, help="attention of PyTorch itself, the usual choice")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from exclusive(self, "mem_eff_attn", "xformers")
        yield from exclusive(self, "mem_eff_attn", "sdpa")
        yield from exclusive(self, "xformers", "sdpa")

    @property
    def back_end(self) -> str:
        """Name of the implementation."""
        return "xformers" if self.xformers else "mem_eff_attn" if self.mem_eff_attn else "torch"


@dataclass(frozen=True, kw_only=True)
class DitAttentionOptions:
    """Transformer attention: which implementation computes it in the denoiser."""

    attn_mode: str | None = option(
        None,
        help="implementation; sdpa is another name of torch",
        choices=("torch", "xformers", "flash", "sageattn", "sdpa"),
    )
    split_attn: bool = option(False, help="attend to one image of the batch at a time: less memory")


@dataclass(frozen=True, kw_only=True)
class DiffusersAttentionOptions:
    """Old attention flag: kept for existing command lines."""

    diffusers_xformers: bool = option(False, help="attention of the xformers package, through diffusers")


# switches of single families -> the implementation that they choose
_SWITCHES = {"use_flash_attn": "flash", "use_sage_attn": "sageattn"}


def chosen_back_end(options: OptionSet) -> tuple[str, str]:
    """(flag, implementation of the denoiser's attention); flags of a family win over the shared ones."""
    values = options.values()
    if values.get("attn_mode"):
        return "--attn_mode", values["attn_mode"]
    for name, back_end in _SWITCHES.items():
        if values.get(name):
            return f"--{name}", back_end
    back_end = options[AttentionOptions].back_end
    return f"--{back_end}", back_end


def splits_attention(options: OptionSet) -> bool:
    """Whether the denoiser attends within one image of the batch after the other."""
    return bool(options.values().get("split_attn"))
