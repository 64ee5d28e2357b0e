"""Option values in TOML files: reading, checking, writing."""

import json
import logging
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.base.errors import Problem, UserError, nearest
from library.options.values import Option, accept

logger = logging.getLogger("diffusion_scripts")

# A common front end writes these beside the options although they are arguments of the network module.
NETWORK_ARGUMENT_KEYS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")

# Keys that front ends write and no training script has ever read: (key, why nothing happens).
DEAD_KEYS = {"lowvram": "no script reads it; see --blocks_to_swap and --gradient_checkpointing for saving memory"}

SECRETS = frozenset({"huggingface_token", "wandb_api_key"})


def config_path(text: str) -> Path:
    """The file that `--config_file` means; `.toml` may be left out."""
    path = Path(text)
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def load_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UserError: missing, unreadable or malformed.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError("--config_file", str(path), f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError("--config_file", str(path), "is not UTF-8 text; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        hint = ""
        if "escape" in str(error).lower() or "\\" in str(error) or "hex value" in str(error).lower():
            hint = '; write paths with forward slashes ("C:/images") or in single quotes'
        raise UserError("--config_file", str(path), f"is not valid TOML: {error}{hint}") from error


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the top level and of its tables, one level deep; section names mean nothing, later ones win."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(value)
        else:
            flat[key] = value
    return flat


class FileValues:
    """What a configuration file says.

    Attributes:
        values: option name -> checked value.
        network_arguments: "key=value" texts meant for the network module.
        problems: everything that stops the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self.network_arguments: list[str] = []
        self.problems: list[Problem] = []
        self._unknown: list[str] = []

    def read(self, options: Iterable[Option]) -> None:
        """Fill in the values that the script knows and note the rest."""
        keys = {key: option for option in options for key in (option.name, *option.aliases)}
        flat = flatten(load_toml(self.path))
        # the proper names first: an old spelling in the same file wins, as it always has
        for key in sorted(flat, key=lambda key: key in keys and keys[key].name != key):
            if key in keys:
                self._take(keys[key], key, flat[key])
            elif key in NETWORK_ARGUMENT_KEYS and "network_args" in keys:
                self._take_network_argument(key, flat[key])
            elif key in DEAD_KEYS:
                logger.warning("%s: %s has no effect: %s", self.path, key, DEAD_KEYS[key])
            else:
                self._unknown.append(key)
        self._known = list(keys)

    def finish(self, *, strict: bool) -> None:
        """Report unknown keys: one warning, or a problem each when strict."""
        notes = []
        for key in self._unknown:
            close = nearest(key, self._known)
            hint = f" (did you mean {close!r}?)" if close else ""
            notes.append(f"{key}{hint}")
            if strict:
                self.problems.append(Problem(f"{self.path}: {key}", f"is not an option of this script{hint}"))
        if notes and not strict:
            logger.warning("%s: ignored, not options of this script: %s", self.path, ", ".join(notes))

    def _take(self, option: Option, key: str, value: Any) -> None:
        if not option.toml:
            logger.warning("%s: %s is read from the command line only; ignored here", self.path, key)
            return
        stored, wrong = accept(option, value)
        if wrong:
            self.problems.append(Problem(f"{self.path}: {key}", wrong, value))
        else:
            self.values[option.name] = stored

    def _take_network_argument(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(Problem(f"{self.path}: {key}", "expected a number", value))
        elif value:  # front ends write 0 for "not used"
            self.network_arguments.append(f"{key}={value}")


def dump_toml(values: Mapping[str, Any]) -> str:
    """Flat TOML text of simple values; None is left out."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items() if value is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # a JSON string is a TOML basic string, but for this one control character
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
