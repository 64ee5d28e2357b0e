"""What is in a dataset, and what is odd about it: a report, tag counts and pictures. Needs no model.

python tools/dataset_report.py --dataset_config data.toml --output report_folder
"""

# ruff: noqa: RUF009 - option() makes a dataclass field; the checker does not see it for these annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere, as the scripts do

from library.base.errors import Problem, UserError, raise_problems
from library.base.logs import setup_logging
from library.config_util import DatasetPlan, resolve_datasets
from library.data import images, report, sheets
from library.data.build import dataset_plans
from library.data.dataset import ReadSettings
from library.data.metadata import Folder
from library.data.records import ScanRules
from library.options.captions import CaptionOptions
from library.options.data import AugmentOptions, BucketOptions, DataOptions
from library.options.ranges import at_least
from library.options.schema import OptionSet, build_parser, option, parse
from library.train_util import load_family
from library.training.report import table


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Report: what is looked at, and where the report goes."""

    output: Path = option(help="folder for the report; files of an earlier report in it are replaced")
    family: str | None = option(None, help="model family whose rules for image sizes count; none when not given")
    seed: int = option(0, help="seed of the run: order, crops, texts and validation images follow from it")
    masked_loss: bool = option(False, help="conditioning images are loss masks")
    epoch: int = option(1, help="the epoch whose visits the pictures show")
    sheet_images: int = option(64, help="visits shown per bucket; 0: no pictures of images")
    top_tags: int = option(50, help="how many of the most frequent tags are listed")
    no_duplicates: bool = option(False, help="do not look for equal images: nothing but headers is read")

    def problems(self) -> Iterator[Problem]:
        """Checks that need this group only."""
        yield from at_least(1, epoch=self.epoch)
        yield from at_least(0, sheet_images=self.sheet_images, top_tags=self.top_tags)


GROUPS = (ReportOptions, DataOptions, BucketOptions, AugmentOptions, CaptionOptions)
# of the groups above, what only matters in training
_TRAINING = "dataset_class max_data_loader_n_workers persistent_data_loader_workers cache_info debug_dataset"
HIDDEN = frozenset((*_TRAINING.split(), "prior_loss_weight"))


def setup_parser() -> argparse.ArgumentParser:
    """The tool's flags: its own, and those about data of the training scripts."""
    return build_parser(GROUPS, description=(__doc__ or "").splitlines()[0], hidden=HIDDEN)


def find_plans(options: OptionSet) -> tuple[list[DatasetPlan], str]:
    """Datasets as in training; `--train_data_dir` may also be a folder that holds the images themselves."""
    data = options[DataOptions]
    folder = Path(data.train_data_dir or "")
    described = data.dataset_config or data.in_json or not data.train_data_dir
    if described or not folder.is_dir() or not Folder(folder).images:
        return dataset_plans(str(data.dataset_config) if data.dataset_config else None, options.values())
    subset = {"image_dir": data.train_data_dir, "conditioning_data_dir": data.conditioning_data_dir}
    config = {"datasets": [{"subsets": [{name: value for name, value in subset.items() if value}]}]}
    return resolve_datasets(config, options.values(), source="--train_data_dir"), "--train_data_dir"


def check_output(folder: Path, plans: Sequence[DatasetPlan]) -> None:
    """The pictures of a report must not become training images.

    Raises:
        UserError: the folder is one of the dataset.
    """
    subsets = [subset for plan in plans for subset in plan.subsets]
    taken = [place for subset in subsets for place in (subset.image_dir, subset.conditioning_data_dir) if place]
    if folder.resolve() in [place.resolve() for place in taken]:
        raise UserError("--output", str(folder), "holds images of the dataset; name another folder")


def read_settings(options: OptionSet) -> ReadSettings:
    """How the pictures are read, as in a training without caches.

    Raises:
        UserError: no such colour.
    """
    own, data = options[ReportOptions], options[DataOptions]
    try:
        background = images.parse_background(data.alpha_background)
    except ValueError as error:
        raise UserError("--alpha_background", data.alpha_background, str(error)) from error
    return ReadSettings(
        seed=own.seed,
        max_steps=0,
        with_images=True,
        masked_loss=own.masked_loss,
        exif_transpose=data.exif_transpose,
        background=background,
    )


def run(options: OptionSet) -> report.DataReport:
    """Look at the data, write everything, print the summary.

    Raises:
        UserError: options or the dataset file are wrong, or the output folder cannot be used.
    """
    raise_problems(options.problems())
    own, data = options[ReportOptions], options[DataOptions]
    latent = load_family(own.family).latent if own.family else None
    settings = read_settings(options)
    plans, source = find_plans(options)
    check_output(own.output, plans)
    rules = ScanRules(
        allow_missing_captions=data.allow_missing_captions,
        skip_bad_images=data.skip_bad_images,
        exif_transpose=data.exif_transpose,
        latent_suffixes=(f"{latent.cache_suffix}.npz", f"{latent.cache_suffix}.safetensors") if latent else (),
        write_info=False,
    )
    step, compare = latent.resolution_step if latent else 1, not own.no_duplicates
    found = report.inspect(plans, source=source, seed=own.seed, step=step, rules=rules, duplicates=compare)
    sets = found.images.train
    pictures = sheets.draw_buckets(sets, own.output / "buckets.png")
    if own.sheet_images:
        pictures += sheets.debug_sheets(sets, settings, own.output, "sheet", epoch=own.epoch, limit=own.sheet_images)
    written = report.write_report(found, own.output, top_tags=own.top_tags, pictures=pictures)
    rows = [("files", ", ".join(path.name for path in written[1:])), ("pictures", str(len(pictures)))]
    rows = [*report.summary_rows(found), ("report", str(written[0])), *rows]
    sys.stdout.write(table("dataset", rows) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with code 2 when something would stop a training."""
    setup_logging()
    try:
        raise_problems(run(parse(GROUPS, argv, hidden=HIDDEN)).problems)
    except UserError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
