"""The door to training: for the scripts, and the same from Python."""

import argparse
import errno
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from library.base.errors import FeatureNotAvailable, Problem, UserError, nearest, raise_problems
from library.base.lazy import resolve
from library.base.logs import setup_logging
from library.families import FAMILIES
from library.family import CommandLine, Family
from library.options.cache_tool import CacheToolOptions
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.captions import CaptionOptions
from library.options.checks import missing_problems, shared_problems
from library.options.conditions import condition_warnings
from library.options.config import ConfigOptions
from library.options.config_file import config_path
from library.options.data import AugmentOptions, BucketOptions, DataOptions, DatasetDict
from library.options.distributed import DistributedOptions
from library.options.logging import LoggingOptions
from library.options.model import ModelOptions
from library.options.pending import no_effect_reasons, no_effect_warnings, pending_problems
from library.options.precision import PrecisionOptions
from library.options.schema import OptionSet, write_config

logger = logging.getLogger("diffusion_scripts")
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def load_family(name: str) -> Family:
    """The family called `name` ("sd", "flux", ...)."""
    if name not in FAMILIES:
        close = nearest(name, list(FAMILIES))
        known = ", ".join(FAMILIES)
        raise UserError("family", name, f"known families: {known}" + (f"; did you mean {close!r}?" if close else ""))
    return resolve(FAMILIES[name])


def _family_of(family: Family | str, task: str) -> Family:
    record = load_family(family) if isinstance(family, str) else family
    if task not in record.tasks:
        raise UserError("task", task, f"tasks of {record.name}: {', '.join(sorted(record.tasks))}")
    return record


def make_parser(
    family: Family | str, task: str, preset: str | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """The argument parser of a script."""
    return _family_of(family, task).command_line(task, preset).parser(prog)


def parse_options(family: Family | str, task: str, argv: Sequence[str] | None, preset: str | None = None) -> OptionSet:
    """Options from a command line.

    Raises:
        UserError: flags or file values that are not valid.
    """
    record = _family_of(family, task)
    options = record.command_line(task, preset).parse(argv)
    return options.with_group(record.presets[preset]) if preset else options


def make_options(
    family: Family | str,
    task: str,
    values: Mapping[str, Any],
    dataset: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> OptionSet:
    """Options from Python values.

    Args:
        family: record or name.
        task: what is trained.
        values: by flag name, without dashes.
        dataset: datasets in the shape of the dataset TOML; instead of `dataset_config`.
        preset: variant of the task.

    Raises:
        UserError: unknown names or values that are not valid.
    """
    record = _family_of(family, task)
    options = record.command_line(task, preset).from_values(values)
    if preset:
        options = options.with_group(record.presets[preset])
    return options if dataset is None else options.with_group(DatasetDict(content=dataset))


def find_problems(family: Family | str, task: str, options: OptionSet) -> list[Problem]:
    """Everything that the options alone show to be wrong, the most general last."""
    return list(_problems(_family_of(family, task), task, options))


def _problems(family: Family, task: str, options: OptionSet) -> Iterator[Problem]:
    ignored = {f"--{name}" for name in no_effect_reasons(family.name)}
    found = [*options.problems(), *shared_problems(options, family.latent.resolution_step)]
    found += family.check(options, task)
    available = task in family.available_tasks
    if available:
        found += missing_problems(options)
        found += family.missing(options, task)
        found += pending_problems(options, family.name)
    # a flag that does nothing here gets its warning; its rules do not matter
    yield from (problem for problem in found if problem.where not in ignored)
    if not available:
        message = f"training {_task_words(task)} of {family.title} is not available in this version yet"
        yield Problem(f"{family.name}, {task}", message)


def _task_words(task: str) -> str:
    return {
        "network": "an adapter",
        "full": "the whole model",
        "control_net": "a ControlNet",
        "lllite": "a ControlNet-LLLite",
        "textual_inversion": "textual inversion",
        "leco": "LECO adapters",
    }[task]


def check_options(family: Family | str, task: str, options: OptionSet) -> None:
    """Log what has no effect and stop on what is wrong.

    Raises:
        FeatureNotAvailable: nothing is wrong, but this version cannot train it.
        UserError: all problems together.
    """
    record = _family_of(family, task)
    problems = find_problems(record, task, options)
    if task not in record.available_tasks:
        raise_problems(problems, FeatureNotAvailable if len(problems) == 1 else UserError)
    for warning in (*no_effect_warnings(options, record.name), *condition_warnings(options)):
        logger.warning("%s", warning)
    raise_problems(problems)


def train(family: Family | str, task: str, options: OptionSet) -> Any:
    """Check the options and train.

    Returns:
        The result of the run: final state, saved files, last losses.
    """
    record = _family_of(family, task)
    check_options(record, task, options)
    return resolve("library.training.run:run")(record, task, options)


# what the caching tools read; flags of other groups belong to training
_CACHE_GROUPS = (
    CacheToolOptions,
    ConfigOptions,
    ModelOptions,
    DataOptions,
    BucketOptions,
    AugmentOptions,
    CaptionOptions,
    CachingOptions,
    TextCachingOptions,
    PrecisionOptions,
    DistributedOptions,
    LoggingOptions,
)
_CACHE_FLAGS = ("seed", "masked_loss", "validation_split", "validation_seed")


def cache_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The argument parser of the caching tools, for Stable Diffusion; other families add their own flags."""
    return _cache_command_line("sd").parser(prog)


def _cache_command_line(family: str) -> CommandLine:
    line = _family_of(family, "network").command_line("network")
    description = "Fill caches before training. Takes the flags of the training script; only those about data matter."
    return replace(
        line, groups=(CacheToolOptions, *line.groups), description=description, hidden=line.hidden - {"in_json"}
    )


def cache(family: Family | str, options: OptionSet, *, latents: bool = False, texts: bool = False) -> Any:
    """Encode the images or captions of a dataset into files beside the images.

    Args:
        family: record or name.
        options: as for training.
        latents: encode images.
        texts: encode captions.

    Returns:
        Numbers of files; see `library.training.caching_run.CacheResult`.

    Raises:
        FeatureNotAvailable: this version has no encoders of the family.
        UserError: what is wrong with options, data or files.
    """
    record = _family_of(family, "network")
    if record.load is None or record.identities is None:
        raise FeatureNotAvailable("--family", record.name, "its encoders are not available in this version yet")
    if texts and record.text is None:
        message = f"no program keeps such files for {record.title}: its text encoder is quick enough to run along"
        raise UserError("--family", record.name, message)
    if latents:
        options = options.replace(CachingOptions, cache_latents_to_disk=True)
    if texts:
        options = options.replace(
            TextCachingOptions, cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True
        )
    problems = [*options.problems(), *pending_problems(options, record.name), *record.missing(options, "network")]
    if options[ModelOptions].pretrained_model_name_or_path is None:
        problems.append(Problem("--pretrained_model_name_or_path", "is required: the base model"))
    raise_problems(problems)
    tool = options.get(CacheToolOptions)
    if tool is not None and tool.skip_existing:
        options = options.replace(CachingOptions, skip_cache_check=True)
    return resolve("library.training.caching_run:run_caching")(record, options, latents=latents, texts=texts)


def cache_main(argv: Sequence[str] | None = None, *, latents: bool = False, texts: bool = False) -> None:
    """Run a caching tool; ends the process with code 2 when the user has something to correct."""
    setup_logging()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--family")
        for name in ("sdxl", "flux"):
            chosen.add_argument(f"--{name}", action="store_true")
        known, _ = chosen.parse_known_args(given)
        family = CacheToolOptions(family=known.family, sdxl=known.sdxl, flux=known.flux).name
        load_family(family)
        options = _cache_command_line(family).parse(given)
        _setup_logging(options[LoggingOptions])
        read = {item.name for group in _CACHE_GROUPS if group in options for item in fields(group)}
        read |= {item.name for group in load_family(family).option_groups for item in fields(group)} | {*_CACHE_FLAGS}
        unread = [f"--{name}" for name in options.changed() if name not in read or name == "t5xxl_dtype"]
        if unread:
            logger.warning("without effect on caches: %s", ", ".join(unread))
        cache(family, options, latents=latents, texts=texts)
    except UserError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _setup_logging(options: LoggingOptions) -> None:
    try:
        setup_logging(options.console_log_level, options.console_log_file, options.console_log_simple)
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise UserError("--console_log_file", options.console_log_file, message) from error


def main(
    family: str,
    task: str,
    preset: str | None = None,
    argv: Sequence[str] | None = None,
    *,
    renamed_to: str | None = None,
) -> None:
    """Run a training script; the process ends with code 2 when the user has something to correct.

    Args:
        family: name of the model family.
        task: what is trained.
        preset: variant of the task.
        argv: arguments; those of this process when None.
        renamed_to: the script that replaces the one that was called.
    """
    setup_logging()
    try:
        if renamed_to:
            logger.warning("this script is called %s now; the old name still works", renamed_to)
        options = parse_options(family, task, argv, preset)
        log = options[LoggingOptions]
        _setup_logging(log)
        if options[ConfigOptions].output_config:
            path = config_path(options[ConfigOptions].config_file or "config.toml")
            write_config(options, path)
            logger.info("options written to %s", path)
            return
        result = train(family, task, options)
        if result.exit_code:
            sys.exit(result.exit_code)
    except UserError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        what = error.filename or "a file"
        sys.stderr.write(
            f"error: {what}: cannot be written: {error.strerror}; make room, then go on with --resume auto\n"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
