"""Dataset configurations made from flags alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.base.errors import UserError
from library.base.logs import logger


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
