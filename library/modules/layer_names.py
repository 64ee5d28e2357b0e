"""The names of a denoiser's layers in the diffusers layout, as a table of rules per family."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = Callable[[int, int], tuple[int, ...]]
"""(input size, output size) of a fused layer -> output sizes of its parts."""


def thirds(in_features: int, out_features: int) -> tuple[int, ...]:  # noqa: ARG001 - the signature of Parts
    """Query, key and value rows of equal number."""
    return (out_features // 3,) * 3


def grouped(in_features: int, out_features: int) -> tuple[int, ...]:
    """Query, key and value rows where keys and values have fewer heads; queries have the input's size."""
    rest = (out_features - in_features) // 2
    return in_features, rest, rest


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Where layers of the published layout are in the diffusers layout.

    Attributes:
        pattern: regular expression that matches a whole layer path ("double_blocks.3.img_attn.qkv").
        names: diffusers paths, with the pattern's groups; several where diffusers splits the layer's rows.
        parts: output sizes of a layer that is split.
        swapped: whether the two halves of the rows change places (shift, scale -> scale, shift).
        flat: whether a convolution of one pixel is a linear layer in diffusers.
        component: of diffusers' pipeline that has the layer, where it is not the model part's own.
    """

    pattern: str
    names: tuple[str, ...]
    parts: Parts = thirds
    swapped: bool = False
    flat: bool = False
    component: str = ""


def find_rule(rules: Iterable[LayerRule], path: str) -> tuple[LayerRule, tuple[str, ...]] | None:
    """The first rule for a layer, and the layer's names in diffusers; None where diffusers has no such layer."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, path)
        if match is not None:
            return rule, tuple(match.expand(name) for name in rule.names)
    return None


def layer_parts(rule: LayerRule, weight: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """A layer's weight or bias [O, ...] as diffusers holds it: in parts, or with its halves exchanged.

    Args:
        rule: of the layer.
        weight: [O, ...].
        in_features: input size of the layer.
    """
    if rule.swapped:
        return (torch.cat(tuple(reversed(weight.chunk(2, dim=0)))),)
    if len(rule.names) == 1:
        return (weight,)
    return weight.split(rule.parts(in_features, weight.shape[0]))
