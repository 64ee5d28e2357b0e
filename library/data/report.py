"""What is odd about a dataset: findings from its records, and from looking into its files.

A finding is no error: the training runs with it. Errors are the problems that `library.data.build.scan` raises.
"""

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from library.base.errors import Problem, UserError
from library.base.logs import logger
from library.base.safetensors_io import write_text_atomic
from library.config_util import DatasetPlan, SubsetPlan
from library.data import images as image_files
from library.data.augment import face_in_name
from library.data.buckets import Bucketing, Placement
from library.data.build import ImageSets, scan
from library.data.dataset import ImageSet
from library.data.metadata import Folder, counted, some
from library.data.records import CAPTION_EXTENSIONS, ImageRecord, ScanRules, scan_dataset

CROP_LIMIT = 0.2  # a larger share of an image cut away is named
ENLARGED_LIMIT = 2.0  # so is a side that is enlarged by more than this
SMALL_SHARE = 0.25  # and an image trained at a smaller share of the resolution's pixels
_NAMED = 3  # examples in a sentence
_LISTED = 20  # files of a finding in the report for people
_THREADS = 4  # decoded images need memory
_FLAT = 8  # grey levels: pictures of less contrast all look the same
_ALIKE, _ALIKE_SHARE = 4.0, 0.2  # distance of equal pictures, in grey levels and as a share of their contrast
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}  # what Pillow calls variants
R = TypeVar("R")


@dataclass(frozen=True)
class Finding:
    """Something about a dataset that is seldom meant.

    Attributes:
        kind: short machine-readable name.
        message: one sentence with numbers.
        files: the images or caption files it is about, all of them.
    """

    kind: str
    message: str
    files: tuple[str, ...] = ()


# from records alone


def dataset_findings(images: Sequence[ImageSet]) -> list[Finding]:
    """What records and placements show; reads no file.

    Kinds: missing_captions, bucket_fill, crop_loss, enlarged, small_images.

    Args:
        images: datasets, numbered in this order in messages. What fills buckets counts as trained on.
    """
    found = list(_missing_captions(images))
    for number, dataset in enumerate(images):
        prefix = f"dataset {number}: " if len(images) > 1 else ""
        found += [
            Finding(one.kind, prefix + one.message, one.files)
            for one in (*_bucket_fill(dataset), *_crop_loss(dataset), *_sizes(dataset))
        ]
    return found


def _missing_captions(images: Sequence[ImageSet]) -> Iterator[Finding]:
    records = [record for record, _ in unique_records(images)]
    missing = [record for record in records if not record.caption]
    if missing:
        text = f"{len(missing)} of {counted(len(records), 'image')} have no caption and are trained on empty text"
        yield Finding("missing_captions", text, _paths(missing))


def unique_records(images: Iterable[ImageSet]) -> list[tuple[ImageRecord, SubsetPlan]]:
    """Every image file once with its subset, though several datasets may train it at different sizes."""
    found: dict[Path, tuple[ImageRecord, SubsetPlan]] = {}
    for dataset in images:
        for record in dataset.records:
            found.setdefault(record.path, (record, dataset.plan.subsets[record.subset]))
    return list(found.values())


def _paths(records: Iterable[ImageRecord]) -> tuple[str, ...]:
    return tuple(str(record.path) for record in records)


def _bucket_fill(images: ImageSet) -> Iterator[Finding]:
    size, counts = images.plan.batch_size, images.ordered().bucket_counts()
    partial = {bucket: count for bucket, count in counts.items() if count % size}
    if not partial:
        return
    low = {bucket: count for bucket, count in partial.items() if count < size}
    end = "ends" if len(partial) == 1 else "end"
    text = f"{len(partial)} of {counted(len(counts), 'bucket')} {end} an epoch with a batch of less than {size}"
    if low:
        worst = sorted(low.items(), key=lambda pair: pair[1])
        names = _examples([f"{_by(bucket)} with {counted(count, 'visit')}" for bucket, count in worst])
        text += f", and {len(low)} never {'fills' if len(low) == 1 else 'fill'} one: {names}"
    files = (str(r.path) for r, place in zip(images.records, images.placements) if place.bucket in low)
    yield Finding("bucket_fill", text, tuple(files))


def _placed(images: ImageSet) -> list[tuple[ImageRecord, Placement]]:
    """Images whose size and crop are the same at every visit."""
    free = [subset.face_crop_aug_range is not None for subset in images.plan.subsets]
    return [
        (record, place)
        for record, place in zip(images.records, images.placements)
        if not (free[record.subset] and face_in_name(record.path.stem))
    ]


def _crop_loss(images: ImageSet) -> Iterator[Finding]:
    placed = _placed(images)
    strong = sorted((pair for pair in placed if pair[1].crop_loss > CROP_LIMIT), key=lambda pair: -pair[1].crop_loss)
    if not strong:
        return
    mean = sum(place.crop_loss for _, place in placed) / len(placed)
    names = _examples([f"{record.key} {place.crop_loss:.1%}" for record, place in strong])
    lose = "loses" if len(strong) == 1 else "lose"
    text = f"{len(strong)} of {counted(len(placed), 'image')} {lose} more than {CROP_LIMIT:.0%} to the crop"
    yield Finding("crop_loss", f"{text} (mean of all {mean:.1%}): {names}", _paths(record for record, _ in strong))


def _scale(record: ImageRecord, place: Placement) -> float:
    """How many times longer the sides become."""
    return max(place.resized[0] / record.size[0], place.resized[1] / record.size[1])


def _sizes(images: ImageSet) -> Iterator[Finding]:
    """Images that are made much larger, and images that stay much smaller than the resolution."""
    placed = _placed(images)
    total, resolution = counted(len(placed), "image"), images.plan.resolution
    strong = [(scale, record) for record, place in placed if (scale := _scale(record, place)) > ENLARGED_LIMIT]
    if strong:
        strong.sort(key=lambda pair: -pair[0])
        names = _examples([f"{record.key} ({_by(record.size)}) {scale:.1f} times" for scale, record in strong])
        text = f"{len(strong)} of {total} {_are(strong)} enlarged more than {ENLARGED_LIMIT:g} times: {names}"
        yield Finding("enlarged", text, _paths(record for _, record in strong))
    gone = {id(record) for _, record in strong}
    limit = SMALL_SHARE * resolution[0] * resolution[1]
    small = [
        record
        for record, place in placed
        if id(record) not in gone and min(_area(record.size), _area(place.bucket)) < limit
    ]
    if small:
        small.sort(key=lambda record: _area(record.size))
        names = _examples([f"{record.key} ({_by(record.size)})" for record in small])
        text = f"{len(small)} of {total} {_are(small)} trained with less than {SMALL_SHARE:.0%} of the pixels of "
        yield Finding("small_images", f"{text}{_by(resolution)}: {names}", _paths(small))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _are(things: Sized) -> str:
    return "is" if len(things) == 1 else "are"


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def tag_counts(images: Sequence[ImageSet]) -> Counter[str]:
    """How often each tag occurs in the captions as they are in the files, in lower case; each image counts once.

    Captions are split at the subset's `caption_separator`, and at its other separators where it has some.
    """
    counts: Counter[str] = Counter()
    for record, subset in unique_records(images):
        rules, text = subset.captions, record.caption
        for other in ("\n", rules.keep_tokens_separator, rules.secondary_separator):
            text = text.replace(other, rules.caption_separator) if other else text
        tags = text.split(rules.caption_separator) if rules.caption_separator else [text]
        # no set: equal counts stay in the order of the files
        counts.update(dict.fromkeys(name for tag in tags if (name := tag.strip().lower())).keys())
    return counts


# from the files


def caption_file_findings(images: Sequence[ImageSet]) -> list[Finding]:
    """What the names in the image folders show.

    Kinds: class_tokens (no caption file, the class tokens stand in), other_captions (caption files of an extension that
    is not read), unused_captions (caption files that no image belongs to).
    """
    members: dict[tuple[Path, str], list[tuple[ImageRecord, SubsetPlan]]] = defaultdict(list)
    for record, subset in unique_records(images):
        if subset.metadata_file is None and subset.image_dir is not None:
            members[subset.image_dir, subset.caption_extension].append((record, subset))
    return [finding for place, several in members.items() for finding in _in_folder(*place, several)]


def _caption_names(stem: str, extension: str) -> set[str]:
    """Names under which a caption is looked for: that of the image, and that before a face position."""
    parts = stem.split("_")
    return {stem + extension} | ({"_".join(parts[:-4]) + extension} if len(parts) >= 5 else set())


def _in_folder(folder: Path, extension: str, members: Sequence[tuple[ImageRecord, SubsetPlan]]) -> Iterator[Finding]:
    try:
        names = {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
        stems = {os.path.splitext(name)[0] for name in Folder(folder).images}
    except OSError:  # the scan says so
        return
    without = [record for record, _ in members if not _caption_names(record.path.stem, extension) & names]
    by_class = [record for record in without if record.caption]
    if by_class:
        tokens = members[0][1].class_tokens
        text = f"{len(by_class)} of {counted(len(members), 'image')} in {folder} have no {extension} caption file"
        yield Finding("class_tokens", f"{text} and are trained on the class tokens {tokens!r}", _paths(by_class))
    for other in (one for one in CAPTION_EXTENSIONS if one != extension):
        unread = sorted(names & {name for stem in stems for name in _caption_names(stem, other)})
        if unread:
            text = f"{counted(len(unread), f'{other} file')} in {folder} {_are(unread)} not read: "
            text += f"caption_extension is {extension}; {len(without)} images there have no {extension} file"
            yield Finding("other_captions", text, tuple(str(folder / name) for name in unread))
    wanted = {name for stem in stems for name in _caption_names(stem, extension)}
    unused = sorted(name for name in names - wanted if name.endswith(extension))
    if unused:
        belong = "belongs" if len(unused) == 1 else "belong"
        text = f"{counted(len(unused), f'{extension} file')} in {folder} {belong} to no image: {_examples(unused)}"
        yield Finding("unused_captions", text, tuple(str(folder / name) for name in unused))


@dataclass(frozen=True)
class FileFacts:
    """What looking into one image file showed.

    Attributes:
        format: name of its format as Pillow has it.
        thumbnail: [8, 8] float32 grey levels; None when it was not decoded.
        fault: why it cannot be decoded.
    """

    format: str = ""
    thumbnail: np.ndarray | None = None
    fault: str = ""


def file_facts(paths: Sequence[Path], *, decode: bool, progress: bool = True) -> dict[Path, FileFacts]:
    """Open every file, with a progress bar on a terminal.

    Args:
        paths: image files.
        decode: make thumbnails too, of a reduced decoding where the format has one.
        progress: whether a bar may be shown.
    """
    image_files.extensions()  # registers what reads the optional formats

    def look(path: Path) -> FileFacts:
        try:
            with Image.open(path) as image:
                kind = image.format or ""
                if not decode:
                    return FileFacts(kind)
                image.draft("L", (128, 128))
                small = image.convert("L").resize((8, 8), Image.Resampling.BOX)
                return FileFacts(kind, np.asarray(small, np.float32))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return FileFacts(fault=str(error))

    return dict(zip(paths, _in_threads(look, paths, "looking into images", progress)))


def _in_threads(work: Callable[[Path], R], items: Sequence[Path], text: str, progress: bool) -> list[R]:
    hidden = None if progress else True  # None: only on a terminal
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(tqdm(pool.map(work, items), desc=text, total=len(items), unit="image", disable=hidden))


def format_findings(facts: dict[Path, FileFacts]) -> list[Finding]:
    """Kinds: wrong_extension (content of another format than the name says; it loads anyway), undecodable."""
    formats = Image.registered_extensions()
    found = []
    wrong = {
        path: fact.format
        for path, fact in facts.items()
        if fact.format and formats.get(path.suffix.lower()) != _SAME_FORMAT.get(fact.format, fact.format)
    }
    if wrong:
        names = _examples([f"{path.name} is {kind}" for path, kind in wrong.items()])
        text = f"{counted(len(wrong), 'image')} {_are(wrong)} of another format than the extension says"
        found.append(Finding("wrong_extension", f"{text} (and can be read anyway): {names}", tuple(map(str, wrong))))
    broken = {path: fact.fault for path, fact in facts.items() if fact.fault}
    if broken:
        names = _examples([f"{path.name}: {fault}" for path, fault in broken.items()])
        text = f"{counted(len(broken), 'image')} cannot be decoded: {names}"
        found.append(Finding("undecodable", text, tuple(map(str, broken))))
    return found


def exact_duplicates(paths: Sequence[Path], *, progress: bool = True) -> list[tuple[Path, ...]]:
    """Groups of files with the same bytes. Only files that share their size with another are read."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            sizes[path.stat().st_size].append(path)
        except OSError:  # gone since the scan
            continue
    candidates = [path for same in sizes.values() if len(same) > 1 for path in same]
    groups: dict[bytes, list[Path]] = defaultdict(list)
    for path, digest in zip(candidates, _in_threads(_digest, candidates, "comparing files", progress)):
        if digest is not None:
            groups[digest].append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _digest(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def near_duplicates(facts: dict[Path, FileFacts], exact: Sequence[tuple[Path, ...]]) -> list[tuple[Path, ...]]:
    """Groups of different files that show the same picture: other sizes, formats or compression.

    The thumbnails of a group are those whose root mean square distance to its first is at most 4 grey levels, and at
    most a fifth of their contrast. Bits of a hash would tell less: compressing a photograph again turns some of them.

    Args:
        facts: with thumbnails.
        exact: groups of equal files; the first of each stands for the others.
    """
    skipped = {path for group in exact for path in group[1:]}
    compared = [(path, fact.thumbnail) for path, fact in facts.items() if path not in skipped]
    kept = [(path, grey.ravel()) for path, grey in compared if grey is not None and grey.std() >= _FLAT]
    if not kept:
        return []
    greys = np.stack([grey for _, grey in kept]) - 128
    limits = np.minimum(_ALIKE, _ALIKE_SHARE * greys.std(axis=1)) ** 2 * greys.shape[1]
    squares = (greys**2).sum(axis=1)
    groups, grouped = [], set()
    for start in range(0, len(kept), 256):  # blocks, since all distances at once would need gigabytes
        block = slice(start, start + 256)
        near = squares[block, None] + squares - 2 * greys[block] @ greys.T <= limits[block, None]
        for first in start + np.flatnonzero(near.sum(axis=1) > 1):
            same = [n for n in np.flatnonzero(near[first - start]) if n >= first and n not in grouped]
            if first not in grouped and len(same) > 1:
                grouped.update(same)
                groups.append(tuple(kept[n][0] for n in same))
    return groups


def duplicate_findings(
    exact: Sequence[tuple[Path, ...]], near: Sequence[tuple[Path, ...]], held_out: frozenset[Path] = frozenset()
) -> list[Finding]:
    """Kinds: duplicates, near_duplicates, and validation_leak: an image trained on that is also validated on.

    Args:
        exact: from `exact_duplicates`.
        near: from `near_duplicates`.
        held_out: the images that are validated on.
    """
    found = []
    both = (("duplicates", exact, "are the same file"), ("near_duplicates", near, "look the same"))
    for kind, groups, text in both:
        if groups:
            names = _examples([" = ".join(path.name for path in group) for group in groups])
            total = sum(len(group) for group in groups)
            message = f"{total} images in {counted(len(groups), 'group')} {text} within their group: {names}"
            found.append(Finding(kind, message, tuple(str(path) for group in groups for path in group)))
    leaks = [group for group in (*exact, *near) if 0 < sum(path in held_out for path in group) < len(group)]
    if leaks:
        message = f"{counted(len(leaks), 'group')} of equal images {_are(leaks)} both trained and validated on"
        found.append(Finding("validation_leak", message, tuple(str(path) for group in leaks for path in group)))
    return found


# everything together


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """All that is known about the data of a run.

    Attributes:
        images: what is trained and validated on; with problems, what could be read of it.
        problems: what would stop the training.
        findings: what would not.
        exact: groups of equal files.
        near: groups of images that look the same.
        compared: whether duplicates were looked for.
        tags: number of images with each tag.
    """

    images: ImageSets
    problems: tuple[Problem, ...] = ()
    findings: tuple[Finding, ...] = ()
    exact: tuple[tuple[Path, ...], ...] = ()
    near: tuple[tuple[Path, ...], ...] = ()
    compared: bool = True
    tags: Counter[str] = field(default_factory=Counter)

    @property
    def all_sets(self) -> tuple[ImageSet, ...]:
        """Datasets that are trained on, then those that are validated on."""
        return (*self.images.train, *self.images.validation)

    def count(self, kind: str) -> int:
        """Files in the findings of a kind."""
        return sum(len(finding.files) for finding in self.findings if finding.kind == kind)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what the program warns of."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


@contextmanager
def _silent() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _scan_all(
    plans: Sequence[DatasetPlan], *, source: str, seed: int, step: int, rules: ScanRules
) -> tuple[ImageSets, list[Problem]]:
    """As `library.data.build.scan`, but problems do not hide the images that can be used."""
    try:
        return scan(plans, source=source, seed=seed, step=step, rules=rules), []
    except UserError as error:
        problems = error.problems
    usable = []
    for index, plan in enumerate(plans):
        with _silent():  # the first scan has said it all
            records, _ = scan_dataset(plan.subsets, where=f"{source}: datasets[{index}]", rules=rules)
        bucketing = Bucketing.from_plan(plan)
        usable.append(ImageSet.build(plan, [record for record in records if not bucketing.refusal(record.size)]))
    return ImageSets(tuple(usable), ()), problems


def inspect(
    plans: Sequence[DatasetPlan],
    *,
    source: str,
    seed: int = 0,
    step: int = 1,
    rules: ScanRules,
    duplicates: bool = True,
) -> DataReport:
    """Look at everything. Problems are in the report instead of being raised.

    Args:
        plans: the datasets.
        source: what they are called in messages.
        seed: of the run, for the validation split.
        step: sizes must be multiples of this many pixels.
        rules: how images are looked for.
        duplicates: decode every image to look for equal ones.
    """
    with _warnings() as warned:
        images, problems = _scan_all(plans, source=source, seed=seed, step=step, rules=rules)
    both = (*images.train, *images.validation)
    paths = [record.path for record, _ in unique_records(both) if record.exists]
    facts = file_facts(paths, decode=duplicates)
    exact = exact_duplicates(paths) if duplicates else []
    near = near_duplicates(facts, exact) if duplicates else []
    held_out = frozenset(record.path for dataset in images.validation for record in dataset.records)
    findings = [
        *dataset_findings(images.train),
        *caption_file_findings(both),
        *format_findings(facts),
        *duplicate_findings(exact, near, held_out),
        *(Finding("warning", text) for text in warned),
    ]
    return DataReport(
        images=images,
        problems=tuple(problems),
        findings=tuple(findings),
        exact=tuple(exact),
        near=tuple(near),
        compared=duplicates,
        tags=tag_counts(both),
    )


def _crop_facts(images: Sequence[ImageSet]) -> dict[str, Any]:
    losses = [(place.crop_loss, str(record.path)) for dataset in images for record, place in _placed(dataset)]
    worst, file = max(losses, default=(0.0, None))
    return {"mean": sum(loss for loss, _ in losses) / max(1, len(losses)), "worst": worst, "worst_file": file}


def _bucket_facts(images: ImageSet) -> list[dict[str, Any]]:
    losses: dict[tuple[int, int], list[float]] = defaultdict(list)
    for place in images.placements:
        losses[place.bucket].append(place.crop_loss)
    return [
        {
            "size": list(bucket),
            "images": len(losses[bucket]),
            "visits": visits,
            "last_batch": visits % images.plan.batch_size or images.plan.batch_size,
            "crop_loss_mean": sum(losses[bucket]) / len(losses[bucket]),
            "crop_loss_worst": max(losses[bucket]),
        }
        for bucket, visits in images.ordered().bucket_counts().items()
    ]


def _dataset_facts(images: ImageSet) -> dict[str, Any]:
    subsets = []
    for index, subset in enumerate(images.plan.subsets):
        members = [number for number, record in enumerate(images.records) if record.subset == index]
        facts: dict[str, Any] = {"name": subset.name, "is_reg": subset.is_reg, "images": len(members)}
        facts["captions"] = sum(bool(images.records[number].caption) for number in members)
        facts["visits"] = sum(images.repeats[number] for number in members)
        subsets.append(facts)
    return {
        "resolution": list(images.plan.resolution),
        "batch_size": images.plan.batch_size,
        "enable_bucket": images.plan.enable_bucket,
        "batches_per_epoch": images.ordered().num_batches(),
        "subsets": subsets,
        "buckets": _bucket_facts(images),
    }


def report_facts(report: DataReport, *, top_tags: int = 50) -> dict[str, Any]:
    """The report as plain values, as `report.json` holds them.

    Args:
        report: what was found.
        top_tags: how many of the most frequent tags.
    """
    records = [record for record, _ in unique_records(report.all_sets)]
    captions = sum(bool(record.caption) for record in records)
    return {
        "version": 1,
        "images": len(records),
        "validation_images": len(unique_records(report.images.validation)),
        "captions": captions,
        "missing_captions": len(records) - captions,
        "wrong_extensions": report.count("wrong_extension"),
        "crop_loss": _crop_facts(report.images.train),
        "datasets": [_dataset_facts(images) for images in report.images.train],
        "duplicates": [[str(path) for path in group] for group in report.exact] if report.compared else None,
        "near_duplicates": [[str(path) for path in group] for group in report.near] if report.compared else None,
        "tags": {
            "different": len(report.tags),
            "used_once": sorted(tag for tag, count in report.tags.items() if count == 1),
            "most_frequent": [list(pair) for pair in report.tags.most_common(top_tags)],
        },
        "problems": [str(problem) for problem in report.problems],
        "findings": [{"kind": one.kind, "message": one.message, "files": list(one.files)} for one in report.findings],
    }


def summary_rows(report: DataReport) -> list[tuple[str, str]]:
    """The most important numbers as (name, value) lines."""
    facts = report_facts(report, top_tags=8)
    full = [one["last_batch"] == data["batch_size"] for data in facts["datasets"] for one in data["buckets"]]
    crop, tags = facts["crop_loss"], facts["tags"]
    worst = f", worst {crop['worst']:.1%} ({Path(crop['worst_file']).name})" if crop["worst"] else ""
    same = "not looked for"
    if report.compared:
        same = ", ".join(
            f"{sum(map(len, groups))} {text} in {counted(len(groups), 'group')}"
            for groups, text in ((report.exact, "equal files"), (report.near, "that look the same"))
        )
    held_out = f", {facts['validation_images']} of them for validation" if facts["validation_images"] else ""
    rows = [
        ("images", f"{facts['images']}{held_out}"),
        ("captions", f"{facts['captions']}, {facts['missing_captions']} missing"),
        ("wrong extensions", str(facts["wrong_extensions"])),
        ("buckets", f"{len(full)}, {full.count(False)} with a last batch that is not full"),
        ("cropped away", f"{crop['mean']:.1%} on average{worst}"),
        ("duplicates", same),
        ("tags", f"{tags['different']} different, {len(tags['used_once'])} used once"),
        ("most frequent", ", ".join(f"{tag} ({count})" for tag, count in tags["most_frequent"]) or "none"),
    ]
    return [*rows, ("problems", str(len(report.problems)))] if report.problems else rows


def markdown(report: DataReport, *, top_tags: int = 50, pictures: Sequence[Path] = ()) -> str:
    """The report for people.

    Args:
        report: what was found.
        top_tags: how many of the most frequent tags.
        pictures: files in the report's folder to show.
    """
    facts = report_facts(report, top_tags=top_tags)
    lines = ["# Dataset report", ""]
    if report.problems:
        lines += ["## Problems", "", "Training stops at these; correct them first.", ""]
        lines += [*(f"- {_escaped(str(problem))}" for problem in report.problems), ""]
    lines += ["## Summary", "", *_table(("", ""), summary_rows(report)), "", "## Findings", ""]
    lines += [line for finding in report.findings for line in _finding_lines(finding)] or ["None."]
    for number, dataset in enumerate(facts["datasets"]):
        size, batch = _by(dataset["resolution"]), dataset["batch_size"]
        lines += ["", f"## Dataset {number}: {size}, batch size {batch}, {dataset['batches_per_epoch']} batches", ""]
        rows = [(one["name"], one["images"], one["captions"], one["visits"]) for one in dataset["subsets"]]
        lines += [*_table(("subset", "images", "with caption", "visits per epoch"), rows), ""]
        rows = [
            (_by(one["size"]), one["images"], one["visits"], one["last_batch"])
            + (f"{one['crop_loss_mean']:.1%}", f"{one['crop_loss_worst']:.1%}")
            for one in dataset["buckets"]
        ]
        lines += _table(("bucket", "images", "visits", "last batch", "cropped away", "worst"), rows)
    once = facts["tags"]["used_once"]
    lines += ["", "## Tags", "", *_table(("tag", "images"), facts["tags"]["most_frequent"]), ""]
    lines += [f"Used once: {_escaped(some(once))}." if once else "No tag is used only once.", ""]
    if pictures:
        lines += ["## Pictures", "", *(f"![{path.stem}](<{path.name}>)\n" for path in pictures)]
    return "\n".join(lines) + "\n"


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield f"- **{finding.kind.replace('_', ' ')}**: {_escaped(finding.message)}"
    yield from (f"  - {_escaped(name)}" for name in finding.files[:_LISTED])
    if len(finding.files) > _LISTED:
        yield f"  - and {len(finding.files) - _LISTED} more, all in report.json"


def _escaped(value: Any) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(str(value).split())
    for letter in "\\`*_|<>[]":
        text = text.replace(letter, f"\\{letter}")
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_escaped(value) for value in row) + " |" for row in rows]


def write_report(report: DataReport, folder: Path, *, top_tags: int = 50, pictures: Sequence[Path] = ()) -> list[Path]:
    """Write `report.md`, `report.json` and `tags.csv` (every tag, the most frequent first).

    Args:
        report: what was found.
        folder: where they go; made where it is missing.
        top_tags: how many of the most frequent tags the first two list.
        pictures: files in the folder that `report.md` shows.

    Raises:
        UserError: the folder cannot be written to.
    """
    facts = {**report_facts(report, top_tags=top_tags), "pictures": [path.name for path in pictures]}
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("tag", "images"), *report.tags.most_common()])
    texts = {
        "report.md": markdown(report, top_tags=top_tags, pictures=pictures),
        "report.json": json.dumps(facts, ensure_ascii=False, indent=2) + "\n",
        "tags.csv": table.getvalue(),
    }
    try:
        for name, text in texts.items():
            write_text_atomic(folder / name, text)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; choose another folder or check its permissions"
        raise UserError(str(folder), message=reason) from error
    return [folder / name for name in texts]
