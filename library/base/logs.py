"""Logging to the console and a file; only the first process speaks unless asked otherwise."""

import logging
import os
import sys

LOGGER_NAME = "diffusion_scripts"
logger = logging.getLogger(LOGGER_NAME)


class _FirstRankOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


class _PlainFormatter(logging.Formatter):
    """Messages as they are; warnings and errors carry their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def setup_logging(level: str | None = None, file: str | None = None, simple: bool = False) -> None:
    """Send our messages to stderr or to a file.

    Args:
        level: name of a logging level; INFO when None.
        file: write here instead of the console.
        simple: print messages without time and level.
    """
    handler: logging.Handler = (
        logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    )
    handler.addFilter(_FirstRankOnly())
    stamped = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(stamped if file and not simple else _PlainFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level or "INFO")
    logger.propagate = False
