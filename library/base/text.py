"""The line grammar of prompt files."""

import re
from collections.abc import Callable
from typing import Any

# option letter(s) -> (prompt key, converter)
PROMPT_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "g": ("guidance_scale", float),
    "n": ("negative_prompt", str),
    "ss": ("sample_sampler", str),
    "cn": ("controlnet_image", str),
    "ctr": ("cfg_trunc_ratio", float),
    "rcfg": ("renorm_cfg", float),
    "fs": ("flow_shift", float),
}


def parse_prompt_line(line: str) -> dict[str, Any]:
    """One line of a prompt file: `a cat --w 512 --h 768 --d 1 --n blurry`.

    Returns:
        `prompt` and the keys of the options given.

    Raises:
        ValueError: an unknown option or a value of the wrong type; the text names it.
    """
    first, *parts = re.split(r"(?:^|\s)--(?=[A-Za-z]+(?:\s|$))", line.strip())
    result: dict[str, Any] = {"prompt": first.strip()}
    for part in parts:
        name, _, value = part.strip().partition(" ")
        if name.lower() not in PROMPT_OPTIONS:
            known = ", ".join(f"--{option}" for option in PROMPT_OPTIONS)
            raise ValueError(f"unknown option --{name}; known options: {known}")
        key, convert = PROMPT_OPTIONS[name.lower()]
        try:
            result[key] = convert(value.strip())
        except ValueError as error:
            raise ValueError(f"--{name} {value.strip()}: expected {convert.__name__}") from error
    return result
