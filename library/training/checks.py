"""Everything that can be known to be wrong before weights load, reported together."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from library.base.errors import Problem, UserError, raise_problems
from library.base.lazy import resolve
from library.config_util import SubsetPlan
from library.data.attributes import attribute_problems
from library.data.build import ImageSets, dataset_plans, scan
from library.data.records import ScanRules
from library.diffusion.flow import LOGIT_SAMPLING
from library.family import Family
from library.modules.attention import check_back_end
from library.modules.components import Variant
from library.modules.loading import open_model_file
from library.optim.registry import check_optimizer
from library.options.attention import chosen_back_end
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.compiling import CompileOptions
from library.options.data import DataOptions, DatasetDict
from library.options.debug import RecordOptions
from library.options.loss import LossOptions
from library.options.network import NetworkOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schema import OptionSet
from library.options.tracking import TrackingOptions
from library.sampling.prompts import SampleDefaults, SampleRequest, read_prompts
from library.strategy_base import Strategies
from library.tracking.trackers import check_trackers
from library.training.network_adapter import import_network_module, is_ours, parse_network_arguments
from library.training.plan import narrow_denoiser, narrow_text_encoders

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


def inspect_run(family: Family, options: OptionSet, seed: int, *, is_main: bool = True) -> Inspected:
    """Read headers, dataset, captions, prompts and tokenizers.

    Args:
        family: of the model.
        options: of the run.
        seed: for the choice of validation images.
        is_main: whether this process may write beside the images.

    Raises:
        UserError: all problems of all of them.
    """
    collector = _Collector()
    inspected, collector.problems = inspect_data(family, options, seed, is_main=is_main)
    collector.run(lambda: _check_network(family, options))
    collector.run(lambda: check_optimizer(options[OptimizerOptions]))
    collector.run(lambda: _check_computing(options))
    collector.run(lambda: check_trackers(options[TrackingOptions]))
    collector.problems += _output_problems(options)
    requests: list[SampleRequest] | None = []
    sampling = options[SamplingOptions]
    if sampling.sample_prompts and inspected is not None:
        defaults: SampleDefaults = inspected.strategies.denoising.sample_defaults
        requests = collector.run(lambda: read_prompts(sampling.sample_prompts, defaults))
        message = defaults.sampler_problem(sampling.sample_sampler)
        if message is not None:
            collector.problems.append(Problem("--sample_sampler", message, sampling.sample_sampler))
    raise_problems(collector.problems)
    assert inspected is not None and requests is not None
    return replace(inspected, requests=requests)


def inspect_data(
    family: Family, options: OptionSet, seed: int, *, is_main: bool
) -> tuple[Inspected | None, list[Problem]]:
    """Read the model's headers and the dataset; with the problems that were found. See `inspect_run`."""
    collector = _Collector()
    variant = collector.run(lambda: resolve(family.inspect)(options))
    strategies = None
    if variant is not None:
        strategies = collector.run(lambda: resolve(family.strategies)(options, variant))
    images = collector.run(lambda: _images(family, options, seed, is_main=is_main))
    if variant is None or strategies is None or images is None:
        return None, collector.problems
    strategies.denoising.expect_sizes([one.plan.resolution for one in images.train])
    return Inspected(variant=variant, strategies=strategies, images=images, requests=[]), collector.problems


def _check_network(family: Family, options: OptionSet) -> None:
    """Import the network module, look at its arguments where it tells them, and at the headers of adapter files."""
    network = options[NetworkOptions]
    files = [("--network_weights", network.network_weights)] if network.network_weights else []
    files += [("--base_weights", path) for path in network.base_weights or ()]
    for flag, path in files:
        open_model_file(flag, path)
    module = import_network_module(network.network_module or family.default_network)
    if is_ours(module):
        module.create_network.check_arguments(parse_network_arguments(network.network_args))


def _check_computing(options: OptionSet) -> None:
    """Attention and compiler that are asked for can be used here."""
    check_back_end(*chosen_back_end(options))
    compiling = options[CompileOptions]
    if compiling.torch_compile:
        known = torch._dynamo.list_backends(exclude_tags=())
        if compiling.dynamo_backend not in known:
            message = f"this torch has no such backend; it has {', '.join(known)}"
            raise UserError("--dynamo_backend", compiling.dynamo_backend, message)
    network = options[NetworkOptions]
    if network.base_weights and (narrow_denoiser(options) or narrow_text_encoders(options)):
        message = "cannot be merged into 8-bit weights; merge them into the model file first, or leave the fp8 flag out"
        raise UserError("--base_weights", ", ".join(network.base_weights), message)


def _output_problems(options: OptionSet) -> list[Problem]:
    """Whether the folders that the run writes to exist or can be made."""
    folders = {
        "--output_dir": options[SavingOptions].output_dir,
        "--logging_dir": options[TrackingOptions].logging_dir,
        "--record_steps": options[RecordOptions].record_steps,
    }
    return [problem for flag, name in folders.items() if name for problem in _folder_problems(flag, name)]


def _folder_problems(flag: str, name: str) -> list[Problem]:
    folder = Path(name).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        return [Problem(flag, f"cannot be made: {existing} is a file; choose another folder", str(folder))]
    if not os.access(existing, os.W_OK):
        return [Problem(flag, f"cannot be written: no permission for {existing}; choose another folder", str(folder))]
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        _make(folder)
    except OSError as error:
        return [Problem(flag, f"cannot be made: {error.strerror}; choose another folder", str(folder))]
    finally:  # nothing stays of what is only looked at, unless another process has begun to use it
        for place in made:
            with suppress(OSError):
                place.rmdir()
    return []


def _make(folder: Path, attempts: int = 3) -> None:
    """Make a folder, although another process of the run may just take away what it looked at itself."""
    for attempt in range(attempts):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            if attempt + 1 == attempts:
                raise
            continue
        return


def _images(family: Family, options: OptionSet, seed: int, *, is_main: bool) -> ImageSets:
    data = options[DataOptions]
    given = options.get(DatasetDict)
    config: str | Mapping[str, Any] | None = given.content if given else data.dataset_config
    plans, source = dataset_plans(config, options.values())
    raise_problems(
        problem
        for number, plan in enumerate(plans)
        for index, subset in enumerate(plan.subsets)
        for problem in _subset_problems(subset, options, f"{source}: datasets[{number}].subsets[{index}]")
    )
    spec = family.latent
    rules = ScanRules(
        allow_missing_captions=data.allow_missing_captions,
        skip_bad_images=data.skip_bad_images,
        exif_transpose=data.exif_transpose,
        latent_suffixes=(f"{spec.cache_suffix}.npz", f"{spec.cache_suffix}.safetensors"),
        write_info=is_main,
    )
    images = scan(plans, source=source, seed=seed, step=spec.resolution_step, rules=rules)
    raise_problems(_gone_problems(images, options))
    return images


def _subset_problems(subset: SubsetPlan, options: OptionSet, where: str) -> Iterator[Problem]:
    """What contradicts the way a subset is used."""
    caching = options[CachingOptions]
    if subset.changes_pixels and (caching.cache_latents or caching.cache_latents_to_disk):
        message = "color_aug, random_crop and face_crop_aug_range change images at every visit, which cached latents "
        yield Problem(where, message + "cannot follow; turn one of the two off")
    if subset.conditioning_data_dir and not options[LossOptions].masked_loss:
        message = "has an effect only with --masked_loss, which makes these images loss masks"
        yield Problem(f"{where}.conditioning_data_dir", message)
    draws_logits = options.values().get("timestep_sampling") in LOGIT_SAMPLING
    yield from attribute_problems(subset.custom_attributes, f"{where}.custom_attributes", offsets=draws_logits)
    text = options.get(TextCachingOptions)
    if text is None or not text.active:
        return
    if subset.captions.token_warmup_step:
        message = "captions grow while training, which cached text encoder outputs cannot follow; turn one of them off"
        yield Problem(f"{where}.token_warmup_step", message)
    elif subset.captions.varies and not text.cache_caption_variants:
        message = "its captions change at every visit (shuffle, wildcards or dropped tags): cache several variants of "
        yield Problem(where, message + "each with --cache_caption_variants N, or do not cache text encoder outputs")


def _gone_problems(images: ImageSets, options: OptionSet) -> Iterator[Problem]:
    """Images of which only a cache is left can be trained from that alone."""
    gone = [r.path for dataset in (*images.train, *images.validation) for r in dataset.records if not r.exists]
    if gone and not options[CachingOptions].cache_latents_to_disk:
        message = f"{len(gone)} images are gone and only their caches are left: needs --cache_latents_to_disk"
        yield Problem(str(gone[0]), message)
