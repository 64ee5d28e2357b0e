"""Options of the messages a script prints."""

from dataclasses import dataclass

from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Messages: what is printed while the script runs."""

    console_log_level: str | None = option(
        None, help="least important messages to show", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = option(None, help="write messages to this file instead of the console")
    console_log_simple: bool = option(False, help="print messages without time and level")
