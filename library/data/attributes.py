"""`custom_attributes` of a subset: free tables of which these keys have an effect.

`timestep_sampling.offset` (a number) shifts the noise levels of the subset's images; `diff_output_preservation` (true)
trains them to give what the model gives without its adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.base.errors import Problem, nearest

_KNOWN = ("diff_output_preservation", "timestep_sampling")


def timestep_offsets(attributes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Shift of every item's noise level, in logits."""
    return [float(one.get("timestep_sampling", {}).get("offset", 0.0)) for one in attributes]


def preserved(attributes: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which items are trained to keep the model's own prediction."""
    return [bool(one.get("diff_output_preservation")) for one in attributes]


def attribute_problems(attributes: Mapping[str, Any], where: str, *, offsets: bool) -> Iterator[Problem]:
    """What cannot have the effect that it asks for.

    Args:
        attributes: of a subset.
        where: place in the configuration, for messages.
        offsets: whether this run draws noise levels that can be shifted.
    """
    for name in attributes:
        if name not in _KNOWN:
            guess = nearest(name, list(_KNOWN))
            yield Problem(f"{where}.{name}", "nothing reads it" + (f"; did you mean {guess}?" if guess else ""))
    if not isinstance(attributes.get("diff_output_preservation", False), bool):
        value = attributes["diff_output_preservation"]
        yield Problem(f"{where}.diff_output_preservation", "expected true or false", value)
    sampling = attributes.get("timestep_sampling", {})
    place = f"{where}.timestep_sampling"
    if not isinstance(sampling, Mapping):
        yield Problem(place, "expected a table with an offset", sampling)
        return
    for name, value in sampling.items():
        if name != "offset":
            yield Problem(f"{place}.{name}", "unknown key; expected offset")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield Problem(f"{place}.offset", "expected a number", value)
        elif value and not offsets:
            message = "has an effect only in flow models with --timestep_sampling sigmoid, shift or flux_shift"
            yield Problem(f"{place}.offset", message, value)
