"""References to code that is imported only when it is needed."""

import importlib
from types import ModuleType
from typing import Any

from library.base.errors import UserError


def resolve(reference: str) -> Any:
    """The object behind "package.module:attribute"."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def optional_import(name: str, *, needed_for: str, install: str) -> ModuleType:
    """Import a third-party package that not every installation has.

    Args:
        name: module to import, e.g. "bitsandbytes".
        needed_for: what the user asked for, usually a flag with its value.
        install: the argument of `pip install` that brings it.

    Raises:
        UserError: the package is missing or broken; the text says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            needed_for, message=f"needs the package {name!r} ({error}); run: pip install {install}"
        ) from error
