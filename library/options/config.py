"""Options about the options: configuration files and checks."""

from dataclasses import dataclass

from library.options.schema import option


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Configuration file: options read from and written to TOML."""

    config_file: str | None = option(
        None, help="TOML file with option values; what is given on the command line wins", toml=False
    )
    output_config: bool = option(
        False,
        help="write the options that differ from their defaults to --config_file (which must not exist yet; "
        "config.toml when not given) and stop",
        toml=False,
    )
    strict_config: bool = option(False, help="unknown keys in the configuration file are errors instead of warnings")
    dry_run: bool = option(False, help="check options, data and files, show the plan, and stop before training")
