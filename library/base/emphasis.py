"""Weights of words in a prompt: `(more)`, `[less]`, `(exactly:1.3)`; a backslash takes a bracket's meaning away."""

MORE = 1.1
_OPENING = {"(": MORE, "[": 1 / MORE}
_CLOSING = {")": "(", "]": "["}


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """The text without its brackets, cut where the weight changes.

    Brackets nest, and their weights multiply. One that is never closed counts to the end; one that was never opened is
    text.
    """
    parts: list[list] = []  # [characters, weight]
    opened: list[tuple[str, int]] = []  # bracket, first part inside it
    position = 0
    while position < len(text):
        letter = text[position]
        if letter == "\\" and text[position + 1 : position + 2] in (*_OPENING, *_CLOSING, "\\"):
            _add(parts, text[position + 1])
            position += 1
        elif letter in _OPENING:
            opened.append((letter, len(parts)))
            parts.append(["", 1.0])
        elif letter in _CLOSING and opened and opened[-1][0] == _CLOSING[letter]:
            bracket, first = opened.pop()
            factor = _OPENING[bracket]
            if bracket == "(":
                factor = _taken_weight(parts, first) or factor
            for part in parts[first:]:
                part[1] *= factor
            parts.append(["", 1.0])
        else:
            _add(parts, letter)
        position += 1
    for bracket, first in opened:
        for part in parts[first:]:
            part[1] *= _OPENING[bracket]
    return _merged(parts)


def _add(parts: list[list], letter: str) -> None:
    if not parts:
        parts.append(["", 1.0])
    parts[-1][0] += letter


def _taken_weight(parts: list[list], first: int) -> float | None:
    """The number after the last colon inside a closing bracket; it is cut off."""
    text, colon, number = parts[-1][0].rpartition(":")
    if not colon or len(parts) - 1 < first:
        return None
    try:
        weight = float(number)
    except ValueError:
        return None
    parts[-1][0] = text
    return weight


def _merged(parts: list[list]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged
