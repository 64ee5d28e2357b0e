"""What others may see of the options: the part that trackers record, and what the command line gives away."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from library.options.config_file import SECRETS
from library.options.hub import HubOptions
from library.options.schema import OptionSet

_PATH_NAMES = frozenset({"dir", "path", "file", "folder", "json", "weights", "config"})
_FILE_ENDINGS = (
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz", ".toml", ".json", ".jsonl", ".yaml", ".yml"),
    *(".txt", ".csv", ".log", ".png", ".jpg", ".jpeg", ".webp"),
)
_HIDDEN = "***"


def texts_of(value: Any) -> list[str]:
    """The texts in an option's value; numbers and switches have none."""
    if value is None or isinstance(value, bool | int | float):
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def tells_a_place(name: str, value: Any) -> bool:
    """Whether a value names, or may name, a place on this machine.

    That is every text with a slash or backslash, with the ending of a file, or beginning at the home folder, and every
    text of an option that is called a folder, file or the like. Names on the hub are left out with them.
    """
    texts = texts_of(value)
    if texts and name.split("_")[-1] in _PATH_NAMES:
        return True
    return any(
        "/" in text or "\\" in text or text.startswith("~") or text.lower().rstrip("'\" ").endswith(_FILE_ENDINGS)
        for text in texts
    )


def recorded_options(options: OptionSet) -> dict[str, bool | int | float | str | None]:
    """What `--log_config` records: every option but secrets and places on this machine; lists as text."""
    recorded: dict[str, bool | int | float | str | None] = {}
    for name, value in options.values().items():
        if name in SECRETS or name not in options.offered or tells_a_place(name, value):
            continue
        plain = value is None or isinstance(value, bool | int | float | str)
        recorded[name] = value if plain else str(value)
    return recorded


def secrets_of(options: OptionSet) -> list[str]:
    """Tokens and keys among the options."""
    values = options.values()
    return [values[name] for name in sorted(SECRETS) if values.get(name)]


def hide(text: str, secrets: Sequence[str]) -> str:
    """The text without the secrets."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


@contextmanager
def secrets_hidden(secrets: Sequence[str]) -> Iterator[None]:
    """Inside, the command line of this process shows no secrets: wandb records it, on the disk and on its server."""
    before = sys.argv
    sys.argv = [hide(argument, secrets) for argument in before]
    try:
        yield
    finally:
        sys.argv = before


def privacy_notes(options: OptionSet) -> tuple[list[str], list[str]]:
    """What wandb, which records the command line, tells others of it.

    Returns:
        (warnings, remarks): sentences; empty when wandb is not used.
    """
    values = options.values()
    if values.get("log_with") not in ("wandb", "all"):
        return [], []
    given = {name: value for name, value in options.changed().items() if options.origin(name) == "cli"}
    warnings = [
        f"--{name} is on the command line, which everybody on this machine can read; better set {variable} in the "
        "environment (what wandb records of the command line is without it)"
        for name, variable in (("wandb_api_key", "WANDB_API_KEY"), ("huggingface_token", "HF_TOKEN"))
        if name in given
    ]
    places = [f"--{name}" for name, value in given.items() if name not in SECRETS and _is_absolute(value)]
    remarks = []
    if places:
        flags = ", ".join(places)
        remarks.append(f"wandb records the command line with the paths in it ({flags}); --config_file keeps them out")
    if given.get("config_file"):
        remarks.append("wandb records the command line with the name of --config_file")
    hub = options.get(HubOptions)
    if hub is not None and "huggingface_repo_id" in given and not hub.is_public:
        remarks.append("wandb records the command line with the name of a private repository: --huggingface_repo_id")
    return warnings, remarks


def _is_absolute(value: Any) -> bool:
    """Whether a text, or the value in a `key=value` text, is an absolute path of any system."""
    parts = [part for text in texts_of(value) for part in (text, text.partition("=")[2])]
    return any(PurePosixPath(part).is_absolute() or PureWindowsPath(part).is_absolute() for part in parts if part)
