"""From the text in a caption file to the text the model sees, for one visit of one image."""

import math
import re
from random import Random

from library.config_util import CaptionRules

_CHOICE = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\u2985", "\u2986"  # stand in for escaped braces


def is_dropped(rules: CaptionRules, rng: Random, epoch: int) -> bool:
    """Whether a visit gets an empty text.

    Args:
        rules: settings of the subset.
        rng: generator of this visit; drawn from only with a dropout rate.
        epoch: from 1.
    """
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return True
    every = rules.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def vary_caption(caption: str, rules: CaptionRules, rng: Random, *, step: int, max_steps: int) -> str:
    """The text of one visit that is not dropped.

    Args:
        caption: text of the file; several lines only with wildcards.
        rules: settings of the subset.
        rng: generator of this visit; drawn from only where a rule needs chance.
        step: optimizer steps taken before this visit.
        max_steps: length of the run, for warm-up given as a share.
    """
    line = _choose(caption, rng) if rules.enable_wildcard else caption.split("\n", 1)[0]
    line = " ".join(part for part in (rules.caption_prefix, line, rules.caption_suffix) if part)
    if rules.shuffle_caption or rules.token_warmup_step > 0 or rules.caption_tag_dropout_rate > 0:
        line = _rearrange(line, rules, rng, step, max_steps)
    elif rules.keep_tokens_separator:
        line = _without_marker(line, rules)
    if rules.secondary_separator:
        line = line.replace(rules.secondary_separator, rules.caption_separator)
    return line


def _choose(caption: str, rng: Random) -> str:
    """One of several lines, then one option of each {a|b}; doubled braces are literal."""
    line = rng.choice(caption.split("\n"))
    line = line.replace("{{", _OPEN).replace("}}", _CLOSE)
    line = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), line)
    return line.replace(_OPEN, "{").replace(_CLOSE, "}")


def _split(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def _without_marker(line: str, rules: CaptionRules) -> str:
    parts = line.split(rules.keep_tokens_separator)
    if len(parts) == 1:
        return line
    return ", ".join(tag for part in parts for tag in _split(part, rules.caption_separator))


def _rearrange(line: str, rules: CaptionRules, rng: Random, step: int, max_steps: int) -> str:
    """Keep the fixed tags, shorten, shuffle and thin out the others."""
    fixed, free, suffix = _fixed_and_free(line, rules)
    if rules.token_warmup_step > 0:
        steps = rules.token_warmup_step
        steps = math.floor(steps * max_steps) if steps < 1 else steps
        if step < steps:
            growth = (len(free) - rules.token_warmup_min) / steps
            free = free[: math.floor(step * growth) + rules.token_warmup_min]
    if rules.shuffle_caption:
        rng.shuffle(free)
    if rules.caption_tag_dropout_rate > 0:
        free = [tag for tag in free if rng.random() >= rules.caption_tag_dropout_rate]
    return ", ".join(fixed + free + suffix)


def _fixed_and_free(line: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    marker, separator = rules.keep_tokens_separator, rules.caption_separator
    if marker and marker in line:
        head, _, rest = line.partition(marker)
        middle, _, tail = rest.partition(marker)
        return _split(head, separator), _split(middle, separator), _split(tail, separator)
    tags = [tag.strip() for tag in line.strip().split(separator)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
