"""Everything that can be known to be wrong before weights load, reported together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from library.base.errors import Problem, UserError, raise_problems
from library.base.lazy import resolve
from library.config_util import DatasetPlan
from library.data.build import ImageSets, dataset_plans, scan
from library.family import Family
from library.modules.components import Variant
from library.options.data import DataOptions, DatasetDict
from library.options.sampling import SamplingOptions
from library.options.schema import OptionSet
from library.sampling.prompts import SampleDefaults, SampleRequest, read_prompts
from library.strategy_base import Strategies

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
    requests: list[SampleRequest] | None = []
    sampling = options[SamplingOptions]
    if sampling.sample_prompts and strategies is not None:
        defaults: SampleDefaults = strategies.denoising.sample_defaults
        requests = collector.run(lambda: read_prompts(sampling.sample_prompts, defaults))
    raise_problems(collector.problems)
    assert variant is not None and strategies is not None and images is not None and requests is not None
    return Inspected(variant=variant, strategies=strategies, images=images, requests=requests)


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
