"""From dataset plans to image sets, with every problem of the data reported at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.base.errors import Problem, UserError, raise_problems
from library.config_util import DatasetPlan, read_config, resolve_datasets
from library.data.dataset import ImageSet, split_validation
from library.data.presets import from_folder_flags
from library.data.records import scan_dataset


@dataclass(frozen=True)
class ImageSets:
    """The images a run trains on and those it validates on."""

    train: tuple[ImageSet, ...]
    validation: tuple[ImageSet, ...]


def dataset_plans(
    dataset_config: str | Mapping[str, Any] | None, command_line: Mapping[str, Any]
) -> tuple[list[DatasetPlan], str]:
    """Resolved plans, and the name they are called by in messages.

    Args:
        dataset_config: a file, its content, or None for the folder flags.
        command_line: values of flags that stand in where the file is silent.
    """
    if isinstance(dataset_config, Mapping):
        return resolve_datasets(dataset_config, command_line, source="dataset"), "dataset"
    if dataset_config:
        return resolve_datasets(read_config(dataset_config), command_line, source=dataset_config), dataset_config
    folders = from_folder_flags(command_line.get("train_data_dir"), command_line.get("reg_data_dir"))
    return resolve_datasets(folders, command_line, source="--train_data_dir"), "--train_data_dir"


def scan(plans: Sequence[DatasetPlan], *, source: str, seed: int, step: int, allow_missing_captions: bool) -> ImageSets:
    """Find all images, check them and split off the validation images.

    Args:
        plans: the datasets.
        source: what they are called in messages.
        seed: of the run, for the split where a dataset has no validation seed.
        step: sizes must be multiples of this many pixels.
        allow_missing_captions: train images without caption on empty text.

    Raises:
        UserError: everything that is wrong, each with its place.
    """
    problems: list[Problem] = []
    train: list[ImageSet] = []
    validation: list[ImageSet] = []
    for index, plan in enumerate(plans):
        where = f"{source}: datasets[{index}]"
        problems += _size_problems(plan, step, where)
        records, wrong = scan_dataset(plan.subsets, where=where, allow_missing_captions=allow_missing_captions)
        problems += wrong
        kept, held_out = split_validation(plan, records, seed)
        train.append(ImageSet.build(plan, [records[number] for number in kept]))
        if held_out:
            validation.append(ImageSet.build(plan, [records[number] for number in held_out], validation=True))
    raise_problems(problems)
    if not any(images.num_train_images for images in train):
        raise UserError(source, message="holds no image to train on")
    return ImageSets(tuple(train), tuple(validation))


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
