"""Prompts for sample images: files and defaults."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import Problem, UserError, nearest, raise_problems
from library.base.text import PROMPT_OPTIONS, parse_prompt_line

_KEYS = {"prompt", *(key for key, _ in PROMPT_OPTIONS.values())}


@dataclass(frozen=True)
class SampleDefaults:
    """What a prompt gets that does not say otherwise; sizes are rounded down to `multiple`."""

    steps: int
    scale: float
    guidance: float | None = None
    size: int = 512
    multiple: int = 8


@dataclass(frozen=True)
class SampleRequest:
    """One image to make.

    Attributes:
        index: position in the prompt file.
        prompt: what to show.
        negative: what to avoid; used when `scale` is not 1.
        width: pixels.
        height: pixels.
        steps: denoising steps.
        scale: classifier-free guidance.
        guidance: strength for models distilled with guidance.
        seed: of the noise, or None for one derived from the run's seed.
        sampler: name of the sampler, or None for the run's.
    """

    index: int
    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    scale: float
    guidance: float | None
    seed: int | None
    sampler: str | None


def read_prompts(path: str, defaults: SampleDefaults) -> list[SampleRequest]:
    """Requests of a prompt file (.txt lines, .toml or .json).

    Raises:
        UserError: missing file, other format, or every line that cannot be understood.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError("--sample_prompts", path, "no such file")
    problems: list[Problem] = []
    entries = _entries(file, problems)
    requests = [_request(index, entry, defaults) for index, entry in enumerate(entries)]
    raise_problems(problems)
    if not requests:
        raise UserError("--sample_prompts", path, "holds no prompt")
    return requests


def _entries(file: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    suffix = file.suffix.lower()
    try:
        text = file.read_text(encoding="utf-8-sig")
        if suffix == ".txt":
            return _from_lines(file, text, problems)
        if suffix == ".toml":
            table = tomllib.loads(text).get("prompt", {})
            shared = {key: value for key, value in table.items() if key != "subset"}
            return [_checked(file, {**shared, **subset}, problems) for subset in table.get("subset", [])]
        if suffix == ".json":
            items = json.loads(text)
            parsed = [parse_prompt_line(item) if isinstance(item, str) else item for item in items]
            return [_checked(file, item, problems) for item in parsed]
    except ValueError as error:
        raise UserError("--sample_prompts", str(file), f"cannot be read: {error}") from error
    raise UserError("--sample_prompts", str(file), "expected a .txt, .toml or .json file")


def _from_lines(file: Path, text: str, problems: list[Problem]) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        try:
            entries.append(parse_prompt_line(line))
        except ValueError as error:
            problems.append(Problem(f"{file} line {number}", str(error)))
    return entries


def _checked(file: Path, entry: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    for key in entry:
        if key not in _KEYS:
            guess = nearest(key, sorted(_KEYS))
            problems.append(Problem(f"{file}: {key}", "unknown key" + (f"; did you mean {guess}?" if guess else "")))
    return dict(entry)


def _request(index: int, entry: Mapping[str, Any], defaults: SampleDefaults) -> SampleRequest:
    def rounded(key: str) -> int:
        size = int(entry.get(key, defaults.size))
        return max(64, size - size % defaults.multiple)

    seed = entry.get("seed")
    return SampleRequest(
        index=index,
        prompt=str(entry.get("prompt", "")),
        negative=str(entry.get("negative_prompt", "")),
        width=rounded("width"),
        height=rounded("height"),
        steps=min(1000, max(1, int(entry.get("sample_steps", defaults.steps)))),
        scale=float(entry.get("scale", defaults.scale)),
        guidance=entry.get("guidance_scale", defaults.guidance),
        seed=None if seed is None or int(seed) < 0 else int(seed),
        sampler=entry.get("sample_sampler"),
    )
