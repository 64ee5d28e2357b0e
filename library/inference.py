"""The door to images without training: for the scripts, and the same from Python."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.base.errors import FeatureNotAvailable, Problem, UserError, raise_problems
from library.base.lazy import resolve
from library.base.logs import setup_logging
from library.family import CommandLine, Family, InferenceSpec
from library.options.inference import InferenceModelOptions, InferenceOptions
from library.options.schema import OptionSet
from library.train_util import load_family

logger = logging.getLogger("diffusion_scripts")


def _spec(family: Family) -> InferenceSpec:
    if family.inference is None:
        raise FeatureNotAvailable("family", family.name, "images of it cannot be made in this version yet")
    return family.inference


def _command_line(family: Family) -> CommandLine:
    spec = _spec(family)
    return CommandLine(
        groups=(*spec.option_groups, InferenceOptions, InferenceModelOptions),
        description=f"Make an image with {family.title}, as training makes its samples.",
        defaults={"lora_weights": [], **spec.defaults},
        hidden=spec.hidden,
        choices={},
    )


def make_inference_parser(family: Family | str, prog: str | None = None) -> argparse.ArgumentParser:
    """The argument parser of a script that makes images."""
    return _command_line(load_family(family) if isinstance(family, str) else family).parser(prog)


def parse_inference(family: Family | str, argv: Sequence[str] | None) -> OptionSet:
    """Options from a command line.

    Raises:
        UserError: flags or values that are not valid.
    """
    return _command_line(load_family(family) if isinstance(family, str) else family).parse(argv)


def _with_shared_names(family: Family, options: OptionSet) -> OptionSet:
    """The options with shared flags set from the family's own ones that say the same.

    Raises:
        UserError: everything that the options alone show to be wrong.
    """
    spec = _spec(family)
    if spec.shared is None:
        return options
    raise_problems(options.problems())
    own = {name: value for name, value in options.values().items() if name in options.offered and value is not None}
    shared = spec.shared(options)
    return replace(_command_line(family), hidden=spec.hidden - shared.keys()).from_values({**own, **shared})


def training_options(family: Family, options: OptionSet) -> OptionSet:
    """The options of training that say the same of the model.

    Raises:
        UserError: everything that the options alone show to be wrong.
    """
    spec = _spec(family)
    values = {theirs: options.value(ours) for ours, theirs in spec.training.items()}
    cache = options[InferenceModelOptions].tokenizer_cache_dir
    try:
        training = family.command_line("network").from_values({**values, "tokenizer_cache_dir": cache})
    except UserError as error:
        raise type(error)(problems=[_named_as_here(spec, problem) for problem in error.problems]) from error
    problems = [*options.problems(), *family.missing(training, "network")]
    raise_problems(_named_as_here(spec, problem) for problem in problems)
    return training


def _named_as_here(spec: InferenceSpec, problem: Problem) -> Problem:
    """A problem under this script's flag, where training or other scripts call it by another name."""
    ours = {name: f"--{ours}" for ours, theirs in spec.training.items() for name in (theirs, f"--{theirs}")}
    ours |= {f"--{shared}": f"--{own}" for shared, own in spec.names.items()}
    return Problem(ours.get(problem.where, problem.where), problem.message, problem.value)


def make_images(family: Family | str, options: OptionSet) -> list[Path]:
    """Load the model and make the image of the options, or those of stdin.

    Returns:
        The files written.

    Raises:
        UserError: what is wrong with options or files.
    """
    record = load_family(family) if isinstance(family, str) else family
    options = _with_shared_names(record, options)
    training = training_options(record, options)
    try:
        return resolve("library.training.inference_run:run_inference")(record, options, training)
    except UserError as error:
        named = [_named_as_here(_spec(record), problem) for problem in error.problems]
        raise type(error)(problems=named) from error


def main(family: str, argv: Sequence[str] | None = None) -> None:
    """Run a script that makes images; ends the process with code 2 when the user has something to correct.

    Args:
        family: name of the model family.
        argv: arguments; those of this process when None.
    """
    setup_logging()
    try:
        make_images(family, parse_inference(family, argv))
    except UserError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
