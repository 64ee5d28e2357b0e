"""What a family's network module is: a table of which layers get adapters, under which names and with which rank."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from networks.engine.arguments import Argument, Arguments

# Layers are recognised by class name, so quantized layers need no import. Extend the tuples for further ones.
LINEAR_CLASSES: tuple[str, ...] = (
    "Linear",
    "LoRACompatibleLinear",
    "Linear8bitLt",
    "LinearFP8",
    "Linear4bit",
    "LinearNF4",
    "LinearFP4",
    "QuantizedLinear",
)
CONV_CLASSES: tuple[str, ...] = ("Conv2d", "LoRACompatibleConv")

DENOISER = "denoiser"


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """A key of `--network_args` that sets the rank of the layers whose path matches (0 = no adapter)."""

    argument: str
    pattern: str


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """A fused projection that `split_qkv` trains in parts.

    Attributes:
        pattern: regular expression searched in the layer's path.
        parts: (input size, output size) -> output sizes of the parts.
    """

    pattern: str
    parts: Callable[[int, int], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ExtraLayers:
    """Layers outside the blocks, chosen by a list of ranks: the n-th rank is for paths that match the n-th pattern."""

    argument: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """The layers of one model part that can receive adapters.

    Attributes:
        prefix: start of their key names.
        part: "denoiser" or "text_encoder:<index>".
        classes: class names of the modules whose inner layers are adapted.
        conv_classes: further such classes once convolutions are trained (`conv_dim`, `conv_block_dims`).
        prefix_alone: prefix when the model has a single text encoder; same as `prefix` when empty.
        needs: a true/false key of `--network_args` without which the group is left out.
        ranks: rank rules, the first match wins.
        extras: layers outside the blocks.
        splits: fused projections.
    """

    prefix: str
    part: str
    classes: tuple[str, ...]
    conv_classes: tuple[str, ...] = ()
    prefix_alone: str = ""
    needs: str = ""
    ranks: tuple[RankRule, ...] = ()
    extras: tuple[ExtraLayers, ...] = ()
    splits: tuple[SplitRule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BlockScheme:
    """Numbering of U-Net blocks for per-block ranks and learning rates.

    Attributes:
        marker: attribute that a denoiser of this layout has.
        down, mid, up: how many blocks.
        ends: whether one block before and one after them is counted too (their learning-rate factor is 1).
        index: module path -> block number.
    """

    marker: str
    down: int
    mid: int
    up: int
    ends: bool
    index: Callable[[str], int]

    @property
    def num_blocks(self) -> int:
        """Length of the lists `block_dims` and `block_alphas`."""
        return self.down + self.mid + self.up + (2 if self.ends else 0)


Select = Callable[[Arguments, Sequence[str]], Callable[[str], bool]]
Matches = Callable[[re.Pattern[str], str, str], bool]
"""(pattern of `network_reg_dims` or `network_reg_lrs`, key name, path) -> whether the layer is meant."""


def part_of_name(pattern: re.Pattern[str], name: str, path: str) -> bool:
    """Whether the pattern is found in the key name."""
    del path
    return pattern.search(name) is not None


def whole_path(pattern: re.Pattern[str], name: str, path: str) -> bool:
    """Whether the pattern matches the path within its part of the model from end to end."""
    del name
    return pattern.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    """A network module as data.

    Attributes:
        family: for messages.
        groups: text encoders first, so their keys come first.
        arguments: accepted keys of `--network_args`.
        select: (arguments, all denoiser paths) -> which denoiser paths in blocks get adapters; all when None.
        selects_text: whether `select` chooses among the layers of text encoders too.
        matches: how patterns of `network_reg_dims` and `network_reg_lrs` are read.
        schemes: block numberings, the first whose marker fits is used.
    """

    family: str
    groups: tuple[TargetGroup, ...]
    arguments: tuple[Argument, ...]
    select: Select | None = None
    selects_text: bool = False
    matches: Matches = part_of_name
    schemes: tuple[BlockScheme, ...] = ()
