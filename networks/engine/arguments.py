"""`--network_args`: which keys a network module knows, how their text is read, and what to say about mistakes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem, nearest, raise_problems

FLAG = "--network_args"


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One accepted key of `--network_args`.

    Attributes:
        name: the key.
        parse: text -> value; raises ValueError whose text says what was expected.
        default: value when the key is absent or None.
        help: one line for documentation.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any = None
    help: str = ""


@dataclass(frozen=True)
class Arguments:
    """Parsed values by key; every known key is present."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The value of a key that the table knows."""
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key that not every table knows."""
        return self.values.get(name, default)


def parse_arguments(known: Sequence[Argument], given: Mapping[str, Any]) -> Arguments:
    """Read the key=value pairs of `--network_args`.

    Args:
        known: what the network module accepts.
        given: values as text, as they come from the command line; None counts as absent.

    Raises:
        UserError: unknown keys (with the nearest known one) and unreadable values, all of them at once.
    """
    by_name = {argument.name: argument for argument in known}
    values = {argument.name: argument.default for argument in known}
    problems = []
    for key, value in given.items():
        if key not in by_name:
            problems.append(_unknown(key, value, list(by_name)))
            continue
        if value is None:
            continue
        try:
            values[key] = by_name[key].parse(str(value).strip())
        except ValueError as error:
            problems.append(Problem(FLAG, f"expected {error}", f"{key}={value}"))
    raise_problems(problems)
    return Arguments(values)


def _unknown(key: str, value: Any, names: list[str]) -> Problem:
    close = nearest(key, names)
    hint = f"did you mean {close}?" if close else f"known keys: {', '.join(sorted(names))}"
    return Problem(FLAG, f"unknown key {key!r}; {hint}", f"{key}={value}")


def parse_bool(text: str) -> bool:
    """True/false in the usual spellings, any case."""
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise ValueError("true or false")


def parse_int(text: str) -> int:
    """A whole number, at least 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError("a whole number, 0 or more")
    return value


def parse_float(text: str) -> float:
    """A finite number, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a number, 0 or more")
    return value


def parse_probability(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ValueError("a probability: 0 or more, below 1")
    return value


def parse_choice(*choices: str) -> Callable[[str], str]:
    """A parser that accepts one of the given words."""

    def parse(text: str) -> str:
        if text not in choices:
            close = nearest(text, choices)
            raise ValueError("one of " + ", ".join(choices) + (f" (did you mean {close}?)" if close else ""))
        return text

    return parse


def parse_list(item: Callable[[str], Any], *, length: int | None = None) -> Callable[[str], tuple[Any, ...]]:
    """A parser of comma-separated values, with or without square brackets.

    Args:
        item: parser of one value.
        length: how many values there must be; any number when None.
    """

    def parse(text: str) -> tuple[Any, ...]:
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        values = tuple(item(part.strip()) for part in inner.split(","))
        if length is not None and len(values) != length:
            raise ValueError(f"{length} values separated by commas, not {len(values)}")
        return values

    return parse


def parse_indices(text: str) -> frozenset[int] | None:
    """Block numbers: "all" (None), "none" or "" (empty), or numbers and inclusive ranges such as "0-3,5"."""
    if text == "all":
        return None
    if text in ("none", ""):
        return frozenset()
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise ValueError('"all", "none" or block numbers such as 0-3,5,8-10')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"an ascending range instead of {part.strip()}")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def parse_regex_map(value: Callable[[str], Any]) -> Callable[[str], tuple[tuple[re.Pattern[str], Any], ...]]:
    """A parser of "regex=value,regex=value"; the last "=" of a pair separates, commas cannot occur in a regex."""

    def parse(text: str) -> tuple[tuple[re.Pattern[str], Any], ...]:
        pairs = []
        for part in text.split(","):
            pattern, separator, number = part.rpartition("=")
            if not separator or not pattern.strip():
                raise ValueError("pairs regex=value, separated by commas")
            try:
                pairs.append((re.compile(pattern.strip()), value(number.strip())))
            except re.error as error:
                raise ValueError(f"a valid regular expression instead of {pattern.strip()!r} ({error})") from error
        return tuple(pairs)

    return parse


@dataclass(frozen=True)
class BlockRates:
    """Learning-rate factors of a run of blocks: explicit values, or a preset curve plus an offset."""

    values: tuple[float, ...] = ()
    preset: str | None = None
    offset: float = 0.0

    def expand(self, count: int) -> list[float]:
        """One factor per block; missing values are 1, surplus values are cut off."""
        if self.preset is None:
            return [*self.values, *[1.0] * count][:count]
        return [_PRESETS[self.preset](index, count) + self.offset for index in range(count)]


def _ramp(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 0.0


_PRESETS: Mapping[str, Callable[[int, int], float]] = {
    "cosine": lambda i, n: math.sin(math.pi / 2 * _ramp(n - 1 - i, n)),
    "sine": lambda i, n: math.sin(math.pi / 2 * _ramp(i, n)),
    "linear": _ramp,
    "reverse_linear": lambda i, n: _ramp(n - 1 - i, n),
    "zeros": lambda *_: 0.0,
}


def parse_block_rates(text: str) -> BlockRates:
    """Comma-separated factors (an empty one is 0) or a preset name, optionally followed by "+offset"."""
    match = re.fullmatch(r"([a-z_]+)(?:\+(.+))?", text)
    if match:
        if match[1] not in _PRESETS:
            raise ValueError("numbers, or one of " + ", ".join(_PRESETS) + ", optionally with +offset")
        return BlockRates(preset=match[1], offset=parse_float(match[2]) if match[2] else 0.0)
    return BlockRates(values=tuple(parse_float(part.strip() or "0") for part in text.split(",")))


COMMON_ARGUMENTS: tuple[Argument, ...] = (
    Argument(name="dropout", parse=parse_probability, help="same as --network_dropout"),
    Argument(name="rank_dropout", parse=parse_probability, help="probability of dropping a rank component"),
    Argument(name="module_dropout", parse=parse_probability, help="probability of skipping a whole adapter module"),
    Argument(name="conv_dim", parse=parse_int, help="rank of convolutions with a kernel above 1x1"),
    Argument(name="conv_alpha", parse=parse_float, help="alpha of those convolutions (default 1)"),
    Argument(name="loraplus_lr_ratio", parse=parse_float, help="LoRA+: rate of lora_up over rate of lora_down"),
    Argument(name="loraplus_unet_lr_ratio", parse=parse_float, help="LoRA+ ratio of the denoiser"),
    Argument(name="loraplus_text_encoder_lr_ratio", parse=parse_float, help="LoRA+ ratio of the text encoders"),
)
