"""Everything that can be known to be wrong before weights load, reported together."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from library.base.errors import Problem, UserError, raise_problems
from library.base.lazy import resolve
from library.config_util import DatasetPlan
from library.data.build import ImageSets, dataset_plans, scan
from library.family import Family
from library.modules.components import Variant
from library.modules.loading import open_model_file
from library.optim.registry import build_optimizer
from library.options.data import DataOptions, DatasetDict
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest, read_prompts
from library.strategy_base import Strategies
from library.training.network_adapter import import_network_module, parse_network_arguments

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What the checks found: the model's variant, its strategies, the images, the sample prompts."""

    variant: Variant
    strategies: Strategies
    images: ImageSets
    requests: list[SampleRequest]


class _Collector:
    """Runs checks one after the other and keeps their problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def run(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as error:
            self.problems += error.problems
            return None


def inspect_run(family: Family, options: OptionSet, seed: int) -> Inspected:
    """Read headers, dataset, captions, prompts and tokenizers.

    Raises:
        UserError: all problems of all of them.
    """
    collector = _Collector()
    variant = collector.run(lambda: resolve(family.inspect)(options))
    strategies = None
    if variant is not None:
        strategies = collector.run(lambda: resolve(family.strategies)(options, variant))
    images = collector.run(lambda: _images(family, options, seed))
    collector.run(lambda: _check_network(family, options))
    collector.run(lambda: _check_optimizer(options))
    collector.problems += _output_problems(options)
    requests: list[SampleRequest] | None = []
    sampling = options[SamplingOptions]
    if sampling.sample_prompts and strategies is not None:
        defaults: SampleDefaults = strategies.denoising.sample_defaults
        requests = collector.run(lambda: read_prompts(sampling.sample_prompts, defaults))
    raise_problems(collector.problems)
    assert variant is not None and strategies is not None and images is not None and requests is not None
    return Inspected(variant=variant, strategies=strategies, images=images, requests=requests)


def _check_network(family: Family, options: OptionSet) -> None:
    """Import the network module, look at its arguments where it tells them, and at the headers of adapter files."""
    network = options[NetworkOptions]
    files = [("--network_weights", network.network_weights)] if network.network_weights else []
    files += [("--base_weights", path) for path in network.base_weights or ()]
    for flag, path in files:
        open_model_file(flag, path)
    module = import_network_module(network.network_module or family.default_network)
    check = getattr(module.create_network, "check_arguments", None)
    if check is not None:
        check(parse_network_arguments(network.network_args))


def _check_optimizer(options: OptionSet) -> None:
    """Make the optimizer for one number: wrong names and arguments show without a model."""
    build_optimizer(options[OptimizerOptions], [{"params": [torch.nn.Parameter(torch.zeros(1))]}])


def _output_problems(options: OptionSet) -> list[Problem]:
    """Whether the folder of the results exists or can be made."""
    folder = Path(options[SavingOptions].output_dir).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        return [Problem("--output_dir", f"cannot be made: {existing} is a file", str(folder))]
    if not os.access(existing, os.W_OK):
        return [Problem("--output_dir", f"cannot be written: no permission for {existing}", str(folder))]
    return []


def _images(family: Family, options: OptionSet, seed: int) -> ImageSets:
    data = options[DataOptions]
    given = options.get(DatasetDict)
    config: str | Mapping[str, Any] | None = given.content if given else data.dataset_config
    plans, source = dataset_plans(config, options.values())
    problems = list(_caption_problems(plans, options, source))
    raise_problems(problems)
    return scan(
        plans,
        source=source,
        seed=seed,
        step=family.latent.resolution_step,
        allow_missing_captions=data.allow_missing_captions,
    )


def _caption_problems(plans: list[DatasetPlan], options: OptionSet, source: str) -> list[Problem]:
    """Cached text cannot follow captions that change from visit to visit."""
    if not options.values().get("cache_text_encoder_outputs"):
        return []
    message = (
        "its captions change from visit to visit (shuffle, wildcards, dropout or warm-up), which cached text encoder "
        "outputs cannot follow; turn one of the two off"
    )
    return [
        Problem(f"{source}: datasets[{number}].subsets[{index}]", message)
        for number, plan in enumerate(plans)
        for index, subset in enumerate(plan.subsets)
        if not subset.captions.is_fixed
    ]
