"""Prompts with options: the line grammar of prompt files, and the values that options may have."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from library.base.errors import nearest


@dataclass(frozen=True)
class PromptOption:
    """One option of a prompt.

    Attributes:
        key: its name in TOML and JSON files.
        kind: int, float or str.
        accepts: whether a value of that kind has a meaning.
        expected: what it must be, in words.
    """

    key: str
    kind: type
    accepts: Callable[[Any], bool]
    expected: str

    def from_text(self, text: str) -> Any:
        """The value of a text.

        Raises:
            ValueError: it has no meaning; the message says what was expected.
        """
        try:
            value = self.kind(text)
        except ValueError as error:
            raise ValueError(f"expected {self.expected}") from error
        return self.checked(value)

    def checked(self, value: Any) -> Any:
        """A value of a TOML or JSON file; whole numbers are taken for floats.

        Raises:
            ValueError: of another type, or without a meaning; the message says what was expected.
        """
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            quoted = isinstance(value, str) and self._reads(value)
            raise ValueError(
                f"expected {self.expected}" + (f"; write {value.strip()} without quotes" if quoted else "")
            )
        if not self.accepts(value):
            raise ValueError(f"expected {self.expected}")
        return value

    def _reads(self, text: str) -> bool:
        try:
            return self.accepts(self.kind(text))
        except ValueError:
            return False


def _whole(key: str, minimum: int) -> PromptOption:
    return PromptOption(key, int, lambda value: value >= minimum, f"a whole number of at least {minimum}")


def _number(key: str, accepts: Callable[[float], bool], expected: str) -> PromptOption:
    return PromptOption(key, float, lambda value: math.isfinite(value) and accepts(value), expected)


def _text(key: str, expected: str) -> PromptOption:
    return PromptOption(key, str, lambda value: bool(value.strip()), expected)


# option letter(s) -> what it sets
PROMPT_OPTIONS: dict[str, PromptOption] = {
    "w": _whole("width", 1),
    "h": _whole("height", 1),
    "d": PromptOption("seed", int, lambda value: value < 2**63, "a whole number below 2^63"),
    "s": _whole("sample_steps", 1),
    "l": _number("scale", lambda value: value >= 0, "a number of at least 0"),
    "g": _number("guidance_scale", lambda value: value >= 0, "a number of at least 0"),
    "n": PromptOption("negative_prompt", str, lambda value: isinstance(value, str), "a text"),
    "ss": _text("sample_sampler", "the name of a sampler"),
    "cn": _text("controlnet_image", "the path of an image"),
    "ctr": _number("cfg_trunc_ratio", lambda value: 0 <= value <= 1, "a number between 0 and 1"),
    "rcfg": _number("renorm_cfg", lambda value: value >= 0, "a number of at least 0"),
    "fs": _number("flow_shift", lambda value: value > 0, "a number above 0"),
}


def parse_prompt_line(line: str, options: Mapping[str, PromptOption] = PROMPT_OPTIONS) -> dict[str, Any]:
    """One line of a prompt file: `a cat --w 512 --h 768 --d 1 --n blurry`.

    An option begins with two dashes after a space, and its value ends at the next option. What stands before the first
    option is the prompt, whatever it looks like.

    Args:
        line: the line.
        options: letters -> options that it may have.

    Returns:
        `prompt` and the keys of the options given; of an option given twice the last value.

    Raises:
        ValueError: an unknown option or a value without a meaning; the text names it.
    """
    first, *parts = re.split(r"(?:^|\s)--(?=[A-Za-z])", line.strip())
    result: dict[str, Any] = {"prompt": first.strip()}
    for part in parts:
        name, text = (*part.split(None, 1), "")[:2]
        option, text = options.get(name.lower()), text.strip()
        if option is None:
            known = ", ".join(f"--{letters}" for letters in options)
            raise ValueError(f"unknown option --{name}{_guess(name, options)}; known options: {known}")
        try:
            result[option.key] = option.from_text(text)
        except ValueError as error:
            raise ValueError(f"--{name} {text}".rstrip() + f": {error}") from error
    return result


def _guess(name: str, options: Mapping[str, PromptOption]) -> str:
    """The option that a misspelt one may have meant: its key, another ending, or a value without a space."""
    by_word: dict[str, str] = {}
    for letters, option in options.items():
        for word in (letters, option.key, *reversed(option.key.split("_"))):
            by_word.setdefault(word, letters)
    glued = re.fullmatch(r"([A-Za-z]+?)[=:]?([-\d.].*)", name)
    if glued and glued[1].lower() in options:
        return f"; did you mean --{glued[1]} {glued[2]}?"
    close = nearest(name.lower(), list(by_word))
    return f"; did you mean --{by_word[close]}?" if close else ""
