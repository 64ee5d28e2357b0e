"""The names of a denoiser's layers in the diffusers layout, as a table of rules per family."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Parts = Callable[[int, int], tuple[int, ...]]
"""(input size, output size) of a fused layer -> output sizes of its parts."""


def thirds(in_features: int, out_features: int) -> tuple[int, ...]:  # noqa: ARG001 - the signature of Parts
    """Query, key and value rows of equal number."""
    return (out_features // 3,) * 3


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Where layers of the published layout are in the diffusers layout.

    Attributes:
        pattern: regular expression that matches a whole layer path ("double_blocks.3.img_attn.qkv").
        names: diffusers paths, with the pattern's groups; several where diffusers splits the layer's rows.
        parts: output sizes of a layer that is split.
        swapped: whether the two halves of the rows change places (shift, scale -> scale, shift).
    """

    pattern: str
    names: tuple[str, ...]
    parts: Parts = thirds
    swapped: bool = False


def find_rule(rules: Iterable[LayerRule], path: str) -> tuple[LayerRule, tuple[str, ...]] | None:
    """The first rule for a layer, and the layer's names in diffusers; None where diffusers has no such layer."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, path)
        if match is not None:
            return rule, tuple(match.expand(name) for name in rule.names)
    return None
