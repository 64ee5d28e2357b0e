"""Prompts for sample images: files, defaults, and what of them a model family reads."""

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.base.errors import Problem, UserError, nearest, raise_problems
from library.base.logs import logger
from library.base.text import PROMPT_OPTIONS, parse_prompt_line

FLAG = "--sample_prompts"
SMALLEST, MOST_STEPS = 64, 1000
_OPTIONS = {option.key: option for option in PROMPT_OPTIONS.values()}
_LETTERS = {option.key: letters for letters, option in PROMPT_OPTIONS.items()}
_KEYS = ["prompt", *_OPTIONS]

# what not every family reads -> why it does nothing where it is not read
_WHY_UNREAD = {
    "guidance_scale": "this model takes no guidance value; --l sets classifier-free guidance",
    "sample_sampler": "this model's images are made with its own method",
    "controlnet_image": "there is no ControlNet to show it to",
    "cfg_trunc_ratio": "this model's images are made with guidance from the first step to the last",
    "renorm_cfg": "this model's guidance is not normalised",
    "flow_shift": "this model's noise levels have no shift",
}


@dataclass(frozen=True, kw_only=True)
class SampleDefaults:
    """What a prompt gets that does not say otherwise, and what a family's sampling reads.

    Attributes:
        steps: denoising steps.
        scale: classifier-free guidance.
        guidance: strength for models distilled with guidance.
        size: width and height in pixels.
        multiple: sizes are rounded down to multiples of this.
        sampler: name of the method.
        samplers: names that a prompt may choose from; none where the family has one method.
        sampler_note: what the names have in common, for messages.
        flow_shift: of the noise levels; None where it follows from the image's size.
        cfg_trunc_ratio: share of the steps with classifier-free guidance.
        renorm_cfg: largest growth of the prediction's norm by guidance.
        reads: keys that sampling reads besides prompts, sizes, seed, steps and scale.
    """

    steps: int
    scale: float
    guidance: float | None = None
    size: int = 512
    multiple: int = 8
    sampler: str | None = None
    samplers: tuple[str, ...] = ()
    sampler_note: str = ""
    flow_shift: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    reads: frozenset[str] = frozenset()

    def why_unread(self, key: str) -> str | None:
        """Why a key of a prompt does nothing with this family; None where it is read."""
        if key == "sample_sampler" and self.samplers:
            return None
        return None if key in self.reads else _WHY_UNREAD.get(key)

    def sampler_problem(self, name: str) -> str | None:
        """What is wrong with the name of a sampler; None where it can be used, or where none is read."""
        if not self.samplers or name in self.samplers:
            return None
        close = nearest(name, self.samplers)
        note = f" ({self.sampler_note})" if self.sampler_note else ""
        guess = f"; did you mean {close!r}?" if close else ""
        return f"expected one of {', '.join(self.samplers)}{note}{guess}"


@dataclass(frozen=True, kw_only=True)
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
        sampler: name of the method, or None for the family's only one.
        flow_shift: of the noise levels, or None for the family's own rule.
        cfg_trunc_ratio: share of the steps with classifier-free guidance.
        renorm_cfg: largest growth of the prediction's norm by guidance.
        controlnet_image: path of the image that a ControlNet sees.
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
    flow_shift: float | None = None
    cfg_trunc_ratio: float | None = None
    renorm_cfg: float | None = None
    controlnet_image: str | None = None


@dataclass(frozen=True)
class _Entry:
    """One prompt of a file: where it stands and what it says."""

    where: str
    values: Mapping[str, Any]


@dataclass
class _Reader:
    """Reads the entries of one file and keeps what is wrong with them."""

    file: Path
    problems: list[Problem] = field(default_factory=list)

    def entries(self) -> list[_Entry]:
        """Every prompt of the file that can be understood."""
        readers = {".txt": self._from_lines, ".toml": self._from_toml, ".json": self._from_json}
        read = readers.get(self.file.suffix.lower())
        if read is None:
            raise UserError(FLAG, str(self.file), "expected a .txt, .toml or .json file")
        try:
            return list(read(self.file.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise UserError(FLAG, str(self.file), f"cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # no UTF-8, TOML or JSON
            raise UserError(FLAG, str(self.file), f"cannot be read: {error}") from error

    def _from_lines(self, text: str) -> Iterator[_Entry]:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield from self._line(f"{self.file} line {number}", line)

    def _line(self, where: str, line: str) -> Iterator[_Entry]:
        try:
            yield _Entry(where, parse_prompt_line(line))
        except ValueError as error:
            self.problems.append(Problem(where, str(error)))

    def _from_toml(self, text: str) -> Iterator[_Entry]:
        content = tomllib.loads(text)
        for key in content.keys() - {"prompt"}:
            self.problems.append(
                Problem(f"{self.file}: {key}", "unknown key; prompts stand in [[prompt.subset]] tables")
            )
        table = content.get("prompt", {})
        subsets = table.get("subset", []) if isinstance(table, dict) else None
        if not isinstance(subsets, list) or (isinstance(table, dict) and table and not subsets):
            raise UserError(FLAG, str(self.file), "expected [[prompt.subset]] tables, one for each prompt")
        shared = {key: value for key, value in table.items() if key != "subset"}
        self._table(f"{self.file}: prompt", shared)
        for number, subset in enumerate(subsets):
            where = f"{self.file}: prompt.subset[{number}]"
            if self._table(where, subset):
                yield _Entry(where, {**shared, **subset})

    def _from_json(self, text: str) -> Iterator[_Entry]:
        items = json.loads(text)
        if not isinstance(items, list):
            raise UserError(FLAG, str(self.file), "expected a list of prompts")
        for number, item in enumerate(items):
            where = f"{self.file}: [{number}]"
            if isinstance(item, str):
                yield from self._line(where, item)
            elif self._table(where, item):
                yield _Entry(where, item)

    def _table(self, where: str, table: Any) -> bool:
        """Whether a table is one; its keys and values are checked."""
        if not isinstance(table, dict):
            self.problems.append(Problem(where, "expected a text, or a table of prompt and options"))
            return False
        for key, value in table.items():
            message = _value_problem(key, value)
            if message is not None:
                self.problems.append(Problem(f"{where}.{key}", message))
        return True


def _value_problem(key: str, value: Any) -> str | None:
    """What is wrong with a key and value of a table."""
    if key == "prompt":
        return None if isinstance(value, str) else "expected a text"
    if key not in _OPTIONS:
        close = nearest(key, _KEYS) or {letters: key for key, letters in _LETTERS.items()}.get(key)
        return "unknown key" + (f"; did you mean {close}?" if close else f"; known keys: {', '.join(_KEYS)}")
    try:
        _OPTIONS[key].checked(value)
    except ValueError as error:
        return str(error)
    return None


def read_prompts(path: str, defaults: SampleDefaults) -> list[SampleRequest]:
    """Requests of a prompt file (.txt lines, .toml or .json); one warning names what has no effect.

    Args:
        path: of the file.
        defaults: of the model family.

    Raises:
        UserError: missing file, other format, or everything that cannot be understood or used.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(FLAG, path, "no such file")
    reader = _Reader(file)
    entries = reader.entries()
    problems = reader.problems + [problem for entry in entries for problem in _use_problems(entry, defaults)]
    raise_problems(problems)
    if not entries:
        raise UserError(FLAG, path, "holds no prompt")
    requests = [make_request(index, entry.values, defaults) for index, entry in enumerate(entries)]
    for note in prompt_notes([entry.values for entry in entries], requests, defaults):
        logger.warning("%s: %s", path, note)
    return requests


def _use_problems(entry: _Entry, defaults: SampleDefaults) -> Iterator[Problem]:
    """What cannot be used although it can be read."""
    name = entry.values.get("sample_sampler")
    message = defaults.sampler_problem(name) if isinstance(name, str) else None
    if message is not None:
        yield Problem(f"{entry.where}: --ss", message, name)
    image = entry.values.get("controlnet_image")
    if isinstance(image, str) and defaults.why_unread("controlnet_image") is None and not Path(image).is_file():
        yield Problem(f"{entry.where}: --cn", "no such file", image)


def prompt_notes(
    entries: Iterable[Mapping[str, Any]], requests: Sequence[SampleRequest], defaults: SampleDefaults
) -> Iterator[str]:
    """What a user should know of prompts: options without effect in one sentence, values that were changed in another.

    Args:
        entries: what the prompts say.
        requests: what was made of them.
        defaults: of the model family.
    """
    unread: dict[str, str] = {}
    changed: dict[str, None] = {}
    for entry, request in zip(entries, requests, strict=True):
        for key in entry:
            why = defaults.why_unread(key)
            if key == "negative_prompt" and entry[key] and request.scale == 1.0:
                why = "a negative prompt acts with a scale (--l) other than 1"
            if why is not None:
                unread.setdefault(key, why)
        asked = entry.get("width", request.width), entry.get("height", request.height)
        if asked != (request.width, request.height):
            rule = f"sizes are multiples of {defaults.multiple} and at least {SMALLEST}"
            changed.setdefault(f"{asked[0]}x{asked[1]} becomes {request.width}x{request.height}, {rule}")
        if entry.get("sample_steps", 0) > MOST_STEPS:
            changed.setdefault(f"{entry['sample_steps']} steps become {MOST_STEPS}, the most there can be")
    if unread:
        yield "no effect: " + "; ".join(f"--{_LETTERS[key]} ({key}): {why}" for key, why in unread.items())
    if changed:
        yield "; ".join(changed)


def make_request(index: int, values: Mapping[str, Any], defaults: SampleDefaults) -> SampleRequest:
    """The request of a prompt's checked values.

    Args:
        index: position of the prompt.
        values: by the keys of prompt files; missing ones, and those that the family does not read, get its default.
        defaults: of the model family.
    """
    values = {key: value for key, value in values.items() if defaults.why_unread(key) is None}

    def rounded(key: str) -> int:
        size = values.get(key, defaults.size)
        return max(SMALLEST, size - size % defaults.multiple)

    def number(key: str, otherwise: float | None) -> float | None:
        value = values.get(key, otherwise)
        return None if value is None else float(value)

    seed = values.get("seed")
    return SampleRequest(
        index=index,
        prompt=values.get("prompt", ""),
        negative=values.get("negative_prompt", ""),
        width=rounded("width"),
        height=rounded("height"),
        steps=min(MOST_STEPS, values.get("sample_steps", defaults.steps)),
        scale=float(values.get("scale", defaults.scale)),
        guidance=number("guidance_scale", defaults.guidance),
        seed=None if seed is None or seed < 0 else seed,
        sampler=values.get("sample_sampler", defaults.sampler),
        flow_shift=number("flow_shift", defaults.flow_shift),
        cfg_trunc_ratio=number("cfg_trunc_ratio", defaults.cfg_trunc_ratio),
        renorm_cfg=number("renorm_cfg", defaults.renorm_cfg),
        controlnet_image=values.get("controlnet_image"),
    )
