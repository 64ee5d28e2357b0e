"""From dataset plans to image sets, with every problem of the data reported at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem, UserError, raise_problems
from library.base.logs import logger
from library.config_util import DatasetPlan, read_config, resolve_datasets
from library.data.buckets import Bucketing
from library.data.dataset import ImageSet, split_validation
from library.data.presets import from_flags
from library.data.records import ImageRecord, ScanRules, scan_dataset


@dataclass(frozen=True)
class ImageSets:
    """The images a run trains on and those it validates on."""

    train: tuple[ImageSet, ...]
    validation: tuple[ImageSet, ...]


# flags that describe data on their own and say nothing beside a dataset file
_DATA_FLAGS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


def dataset_plans(
    dataset_config: str | Mapping[str, Any] | None, command_line: Mapping[str, Any], *, control: bool = False
) -> tuple[list[DatasetPlan], str]:
    """Resolved plans, and the name they are called by in messages.

    Args:
        dataset_config: a file, its content, or None for the folder flags.
        command_line: values of flags that stand in where the file is silent.
        control: whether the script trains on pairs of images and control images.
    """
    ignored = [f"--{name}" for name in _DATA_FLAGS if dataset_config and command_line.get(name)]
    if ignored:
        logger.warning("%s have no effect beside a dataset configuration", ", ".join(ignored))
    if isinstance(dataset_config, Mapping):
        return resolve_datasets(dataset_config, command_line, source="dataset"), "dataset"
    if dataset_config:
        return resolve_datasets(read_config(dataset_config), command_line, source=str(dataset_config)), str(
            dataset_config
        )
    source = "--in_json" if command_line.get("in_json") else "--train_data_dir"
    return resolve_datasets(from_flags(command_line, control=control), command_line, source=source), source


def scan(plans: Sequence[DatasetPlan], *, source: str, seed: int, step: int, rules: ScanRules) -> ImageSets:
    """Find all images, check them and split off the validation images.

    Args:
        plans: the datasets.
        source: what they are called in messages.
        seed: of the run, for the split where a subset has no validation seed.
        step: sizes must be multiples of this many pixels.
        rules: how images are looked for.

    Raises:
        UserError: everything that is wrong, each with its place.
    """
    problems: list[Problem] = []
    train: list[ImageSet] = []
    validation: list[ImageSet] = []
    for index, plan in enumerate(plans):
        where = f"{source}: datasets[{index}]"
        problems += _size_problems(plan, step, where)
        records, wrong = scan_dataset(plan.subsets, where=where, rules=rules)
        problems += wrong
        records, wrong = _with_buckets(plan, records, skip=rules.skip_bad_images)
        problems += wrong
        kept, held_out = split_validation(plan, records, seed)
        train.append(ImageSet.build(plan, [records[number] for number in kept]))
        if held_out:
            validation.append(ImageSet.build(plan, [records[number] for number in held_out], validation=True))
    raise_problems(problems)
    if not any(images.num_train_images for images in train):
        raise UserError(source, message="holds no image to train on")
    return ImageSets(tuple(train), tuple(validation))


def _with_buckets(
    plan: DatasetPlan, records: Sequence[ImageRecord], *, skip: bool
) -> tuple[list[ImageRecord], list[Problem]]:
    """The records that have a bucket, and a problem for each that has none; with `skip` a warning instead."""
    bucketing = Bucketing.from_plan(plan)
    refused = [(record, reason) for record in records if (reason := bucketing.refusal(record.size))]
    if not refused:
        return list(records), []
    gone = {id(record) for record, _ in refused}
    kept = [record for record in records if id(record) not in gone]
    if not skip:
        return kept, [Problem(str(record.path), reason) for record, reason in refused]
    for record, reason in refused:
        logger.warning("%s is left out: it %s", record.path, reason)
    return kept, []


def _size_problems(plan: DatasetPlan, step: int, where: str) -> list[Problem]:
    if plan.enable_bucket:
        steps = plan.bucket_reso_steps
        wrong = steps % step != 0
        return (
            [Problem(f"{where}.bucket_reso_steps", f"must be a multiple of {step} for this model", steps)]
            if wrong
            else []
        )
    wrong = any(side % step for side in plan.resolution)
    return (
        [Problem(f"{where}.resolution", f"must be multiples of {step} for this model", plan.resolution)]
        if wrong
        else []
    )
