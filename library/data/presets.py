"""Dataset configurations made from flags alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.base.errors import UserError
from library.base.logs import logger


def from_flags(values: Mapping[str, Any], *, control: bool = False) -> dict[str, Any]:
    """The dataset that `--train_data_dir`, `--reg_data_dir`, `--in_json` and `--conditioning_data_dir` describe.

    With `--in_json` its images; for scripts that train on control images the pairs that lie directly in two folders;
    else the folders of `from_folder_flags`, to which `--conditioning_data_dir` gives loss masks.

    Args:
        values: flags by name; None and "" mean not given.
        control: whether the script trains on pairs of images and control images.

    Raises:
        UserError: a needed folder is not given, missing, or holds nothing of that layout.
    """
    images, masks = values.get("train_data_dir"), values.get("conditioning_data_dir")
    regularization = values.get("reg_data_dir")
    if control:
        _need_pairs(values)
    if not control and not values.get("in_json"):
        config = from_folder_flags(images, regularization)
        for subset in config["datasets"][0]["subsets"]:
            # what regularization images show is not masked
            if masks and not subset["is_reg"]:
                subset["conditioning_data_dir"] = masks
        return config
    if regularization:
        logger.warning("--reg_data_dir has no effect here: it goes with folders named <repeats>_<class> only")
    subset = {"image_dir": images, "metadata_file": values.get("in_json"), "conditioning_data_dir": masks}
    given: dict[str, Any] = {name: str(value) for name, value in subset.items() if value}
    if not values.get("in_json"):
        given["num_repeats"] = 1
    return {"datasets": [{"subsets": [given]}]}


def _need_pairs(values: Mapping[str, Any]) -> None:
    if not values.get("train_data_dir") and not values.get("in_json"):
        message = "is needed: the folder that holds the images, or give a dataset file with --dataset_config"
        raise UserError("--train_data_dir", message=message)
    if not values.get("conditioning_data_dir"):
        message = "is needed: the folder with a control image for each image, or give a dataset file"
        raise UserError("--conditioning_data_dir", message=message)


def from_folder_flags(train_data_dir: str | None, reg_data_dir: str | None) -> dict[str, Any]:
    """The DreamBooth layout: folders named `<repeats>_<class>` below `--train_data_dir` and `--reg_data_dir`.

    Raises:
        UserError: no folder given, missing, or none of its folders has that name.
    """
    if not train_data_dir:
        raise UserError(
            "--dataset_config",
            message="no data: give a dataset file, or --train_data_dir with folders named like 10_cat",
        )
    subsets = list(_numbered_folders(train_data_dir, "--train_data_dir", is_reg=False))
    if not subsets:
        raise UserError(
            "--train_data_dir",
            train_data_dir,
            "has no folder named <repeats>_<class>, for example 10_cat; images go into such a folder",
        )
    if reg_data_dir:
        subsets += _numbered_folders(reg_data_dir, "--reg_data_dir", is_reg=True)
    return {"datasets": [{"subsets": subsets}]}


def _numbered_folders(base: str, flag: str, *, is_reg: bool) -> list[Mapping[str, Any]]:
    if not Path(base).is_dir():
        raise UserError(flag, base, "no such folder")
    subsets = []
    for folder in sorted(path for path in Path(base).iterdir() if path.is_dir()):
        repeats, _, class_tokens = folder.name.partition("_")
        if not repeats.isdecimal() or int(repeats) < 1:
            logger.warning("%s: the folder %r is skipped: its name does not begin with a number", flag, folder.name)
            continue
        subsets.append(
            {
                "image_dir": str(folder),
                "num_repeats": int(repeats),
                # a name like "5" says nothing about the class, so images there need captions
                "class_tokens": class_tokens or None,
                "is_reg": is_reg,
            }
        )
    return [{key: value for key, value in subset.items() if value is not None} for subset in subsets]
