"""Find images, captions and control images. Only headers are read here, unless bad images are to be left out."""

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from library.base.errors import Problem, UserError
from library.base.logs import logger
from library.base.safetensors_io import write_text_atomic
from library.config_util import SubsetPlan
from library.data import images
from library.data.metadata import Folder, Listed, counted, list_metadata, some

CAPTION_EXTENSIONS = (".txt", ".caption", ".captions", ".tags")
MISSING_SHARE = 0.1  # more missing captions than this stop the run
INFO_FILE = "metadata_cache.json"
_MANY = 500  # images from which reading gets a progress bar
_READERS, _DECODERS = 8, 4  # threads; decoded images need memory
_BAD_SHOWN = 5
_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir", "caption_extension")
Size = tuple[int, int]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ImageRecord:
    """One image file.

    Attributes:
        path: the file.
        key: its path below the subset's folder, with forward slashes.
        subset: index of its subset in the dataset.
        size: (width, height) in pixels.
        caption: text of its caption file, or what stands in for it.
        control: its control image or loss mask.
        cache_base: path that names of cache files begin with: the image's without extension, or with it where another
            image of the folder has the same name before the extension.
        exists: whether the image is there; without it, it can only be trained from its caches.
    """

    path: Path
    key: str
    subset: int
    size: tuple[int, int]
    caption: str
    control: Path | None = None
    cache_base: str = ""
    exists: bool = True


@dataclass(frozen=True, kw_only=True)
class ScanRules:
    """How images are looked for.

    Attributes:
        allow_missing_captions: train images without caption on empty text.
        skip_bad_images: leave out images that cannot be read, after decoding every one.
        exif_transpose: turn images as their EXIF data says.
        latent_suffixes: ends of the names of latent caches, for metadata entries whose image is gone.
        write_info: keep sizes in `metadata_cache.json` where a subset asks for it.
    """

    allow_missing_captions: bool = False
    skip_bad_images: bool = False
    exif_transpose: bool = False
    latent_suffixes: tuple[str, ...] = ()
    write_info: bool = True


@dataclass(frozen=True)
class _Seen:
    """What was read from an image and from its caption file."""

    image: Listed
    size: Size = (0, 0)
    fault: str = ""  # why the image cannot be used
    rotated: bool = False  # its EXIF data asks for a turn that it does not get
    stamp: tuple[int, int] = (0, 0)  # bytes and nanoseconds of the last change
    caption: str | None = None
    caption_fault: tuple[Path, str] | None = None
    control: Path | None = None
    control_size: Size = (0, 0)


def scan_dataset(
    subsets: Sequence[SubsetPlan], *, where: str, rules: ScanRules
) -> tuple[list[ImageRecord], list[Problem]]:
    """Records of all subsets of a dataset, and everything that is wrong with them.

    Images of a folder come in the order of their names, those of a metadata file in its order.

    Args:
        subsets: folders and metadata files.
        where: what the dataset is called in messages.
        rules: how images are looked for.
    """
    records: list[ImageRecord] = []
    problems: list[Problem] = []
    listings: list[tuple[SubsetPlan, list[Listed]]] = []
    for index, subset in enumerate(subsets):
        place = f"{where}.subsets[{index}]"
        listed, wrong = _list(subset, rules)
        listings.append((subset, listed))
        found: list[ImageRecord] = []
        if listed:
            found, more = _read_subset(subset, index, listed, rules)
            wrong = [*wrong, *more]
        problems += [Problem(_placed(place, p.where), p.message, p.value) for p in wrong]
        records += found
    problems += [Problem(f"{where}: {p.where}", p.message, p.value) for p in _controls_without_image(listings)]
    if not records and not problems:
        problems.append(Problem(where, "no images were found; add a subset with images"))
    return records, problems


def _placed(place: str, where: str) -> str:
    return f"{place}.{where}" if where in _KEYS else f"{place}: {where}"


def _list(subset: SubsetPlan, rules: ScanRules) -> tuple[list[Listed], list[Problem]]:
    """The images of a subset by name alone."""
    if subset.metadata_file is not None:
        return list_metadata(subset, rules.latent_suffixes)
    assert subset.image_dir is not None
    try:
        folder = Folder(subset.image_dir)
    except FileNotFoundError:
        message = "no such folder; correct the path"
    except NotADirectoryError:
        message = "is no folder; expected the folder that holds the images"
    except OSError as error:
        message = f"cannot be listed: {error.strerror}; check its permissions"
    else:
        unreadable = {suffix: name for suffix, name in images.optional_formats().items() if folder.rest[suffix]}
        if folder.images:
            for suffix, package in unreadable.items():
                text = "%s: %s are left out: this installation cannot read them; run: pip install %s"
                logger.warning(
                    text, subset.image_dir, counted(folder.rest[suffix], f"{suffix} file"), shlex.quote(package)
                )
            return [folder.listed(name, name) for name in folder.images], []
        return [], [Problem("image_dir", _no_images(folder, unreadable), str(subset.image_dir))]
    return [], [Problem("image_dir", message, str(subset.image_dir))]


def _no_images(folder: Folder, unreadable: dict[str, str]) -> str:
    known = ", ".join(images.extensions())
    found = [f"{count} {suffix}" for suffix, count in folder.rest.items()]
    found += [counted(folder.folders, "folder")] if folder.folders else []
    text = f"holds no images ({known})" + (f"; it holds {', '.join(found)}" if found else "")
    if unreadable:
        packages = " ".join(shlex.quote(package) for package in dict.fromkeys(unreadable.values()))
        return f"{text}; to read {', '.join(unreadable)} run: pip install {packages}"
    return text + "; put images directly into it, folders inside are not searched"


def _read_subset(
    subset: SubsetPlan, index: int, listed: Sequence[Listed], rules: ScanRules
) -> tuple[list[ImageRecord], list[Problem]]:
    """Records of the images that can be used."""
    info = _Info(subset, rules) if subset.cache_info and subset.image_dir is not None else None
    controls, problems = _find_controls(subset, listed)

    def look(image: Listed) -> _Seen:
        seen = _look(image, rules, info)
        if subset.metadata_file is None:
            seen = _with_caption(seen, subset)
        return _with_control(seen, controls.get(image.path), rules)

    seen = _in_threads(look, listed, f"reading {subset.name}", _READERS)
    seen, more = _without_bad(seen, subset, rules)
    problems += more
    problems += _caption_faults(seen)
    problems += _control_sizes(seen)
    _warn(seen, subset)
    usable = [one for one in seen if one.caption_fault is None]
    captions = [one.caption if one.caption is not None else subset.class_tokens for one in usable]
    records = [
        ImageRecord(
            path=one.image.path,
            key=one.image.key,
            subset=index,
            size=one.size,
            caption=caption or "",
            control=one.control,
            cache_base=one.image.cache_base,
            exists=one.image.exists,
        )
        for one, caption in zip(usable, captions)
    ]
    problems += caption_problems(subset, records, captions.count(None), allowed=rules.allow_missing_captions)
    if info is not None:
        info.write(usable, records)
    return records, problems


def _in_threads(work: Callable[[T], R], items: Sequence[T], text: str, threads: int) -> list[R]:
    """Results in order, with a progress bar on a terminal where there are many."""
    # None: only on a terminal
    hidden = None if len(items) > _MANY and os.environ.get("RANK", "0") == "0" else True
    with ThreadPoolExecutor(threads) as pool:
        return list(tqdm(pool.map(work, items), desc=text, total=len(items), unit="image", disable=hidden))


def _look(image: Listed, rules: ScanRules, info: "_Info | None") -> _Seen:
    """Size of an image from its header, or from what was noted in an earlier run."""
    if not image.exists:
        assert image.size is not None
        return _Seen(image, image.size, caption=image.caption)
    try:
        status = image.path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        noted = info.noted(image.path, stamp) if info is not None else None
        size, rotated = noted or _header(image.path, rules)
    except (OSError, ValueError) as error:
        return _Seen(image, fault=_reason(error, image.path), caption=image.caption)
    return _Seen(image, size, rotated=rotated, stamp=stamp, caption=image.caption)


def _header(path: Path, rules: ScanRules) -> tuple[Size, bool]:
    """Size of an image, and whether EXIF data asks for a turn that it does not get.

    Raises:
        ValueError: what is wrong with the file.
        OSError: it cannot be opened.
    """
    if path.is_dir():
        raise ValueError("is a folder, not an image")
    size = images.read_size(path, exif_transpose=rules.exif_transpose)
    if images.looks_truncated(path):
        raise ValueError("is cut off: the end of the file is missing")
    if min(size) < 1:
        raise ValueError(f"has no pixels ({size[0]} x {size[1]})")
    return size, not rules.exif_transpose and images.has_rotation(path)


def _reason(error: Exception, path: Path) -> str:
    """What is wrong with a file, without its name."""
    if isinstance(error, UserError):
        text = error.problems[0].message.partition("; ")[0]  # without its advice: the caller gives one
    elif isinstance(error, OSError):
        text = f"cannot be read: {error.strerror or error}"
    else:
        text = str(error)
    return text.removeprefix(f"{path}: ")


# captions


def _with_caption(seen: _Seen, subset: SubsetPlan) -> _Seen:
    """With the text of its caption file: the first line, or with wildcards all lines that hold text."""
    for file in _caption_files(seen.image.path, subset.caption_extension):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except IsADirectoryError:
            return replace(seen, caption_fault=(file, "is a folder; expected a text file with the caption"))
        except UnicodeDecodeError as error:
            fault = f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            return replace(seen, caption_fault=(file, fault))
        except OSError as error:
            fault = f"cannot be read: {error.strerror}; check its permissions"
            return replace(seen, caption_fault=(file, fault))
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if not lines:
            return replace(seen, caption_fault=(file, "is an empty caption; write a caption or delete the file"))
        return replace(seen, caption="\n".join(lines) if subset.captions.enable_wildcard else lines[0])
    return seen


def _caption_files(path: Path, extension: str) -> Iterable[Path]:
    """Where the caption may be: beside the image, then under the name before a face position `_x_y_width_height`."""
    yield path.with_name(path.stem + extension)
    parts = path.stem.split("_")
    if len(parts) >= 5:
        yield path.with_name("_".join(parts[:-4]) + extension)


def _caption_faults(seen: Sequence[_Seen]) -> list[Problem]:
    # images that share a caption file share its fault
    faults = dict.fromkeys(one.caption_fault for one in seen if one.caption_fault is not None)
    return [Problem(str(path), fault) for path, fault in faults]


def caption_problems(
    subset: SubsetPlan, records: Sequence[ImageRecord], missing: int, *, allowed: bool
) -> Iterable[Problem]:
    """A subset in which many captions are missing is usually a mistake.

    Args:
        subset: where the images come from.
        records: its images.
        missing: how many have neither caption nor class tokens.
        allowed: whether the user wants to train these on empty text.
    """
    if not missing:
        return
    share = f"{missing} of {len(records)} images in {subset.metadata_file or subset.image_dir}"
    if subset.metadata_file is not None:
        where, text, hint, others = "metadata_file", f"{share} have neither caption nor tags", "; write captions", []
    else:
        others = [
            extension
            for extension in CAPTION_EXTENSIONS
            if extension != subset.caption_extension and any(r.path.with_suffix(extension).is_file() for r in records)
        ]
        where, text = "caption_extension", f"{share} have no {subset.caption_extension} caption"
        hint = f'; captions ending in {others[0]} are there: set caption_extension = "{others[0]}"' if others else ""
    if not allowed and (others or missing > MISSING_SHARE * len(records)):
        yield Problem(where, f"{text}{hint}, or pass --allow_missing_captions to train them on empty text")
    else:
        logger.warning("%s%s; they are trained on empty text", text, hint if others else "")


# images that cannot be used, and warnings


def _without_bad(seen: Sequence[_Seen], subset: SubsetPlan, rules: ScanRules) -> tuple[list[_Seen], list[Problem]]:
    """The images that can be read. Others are problems, or are left out after decoding every image."""
    if not rules.skip_bad_images:
        advice = "; repair or remove it, or pass --skip_bad_images to leave it out"
        problems = [Problem(str(one.image.path), one.fault + advice) for one in seen if one.fault]
        return [one for one in seen if not one.fault], problems

    def decoded(one: _Seen) -> _Seen:
        try:
            for path in (one.image.path, one.control):
                if path is not None and one.image.exists and not one.fault:
                    images.decode(path, exif_transpose=rules.exif_transpose)
        except (UserError, OSError, ValueError) as error:
            return replace(one, fault=_reason(error, one.image.path))
        return one

    checked = _in_threads(decoded, seen, f"decoding {subset.name}", _DECODERS)
    bad = [one for one in checked if one.fault]
    place = subset.metadata_file or subset.image_dir
    names = [f"{one.image.path.name}: {one.fault}" for one in bad[:_BAD_SHOWN]]
    more = f"; and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
    if bad and len(bad) == len(checked):
        where = "image_dir" if subset.metadata_file is None else "metadata_file"
        text = f"none of its {counted(len(bad), 'image')} can be read ({'; '.join(names)}{more})"
        return [], [Problem(where, f"{text}; replace them or remove the subset", str(place))]
    if bad:
        text = f"{counted(len(bad), 'image')} that cannot be read"
        logger.warning("%s: left out %s: %s%s", place, text, "; ".join(names), more)
    return [one for one in checked if not one.fault], []


def _warn(seen: Sequence[_Seen], subset: SubsetPlan) -> None:
    """One warning for each thing that is not wrong, but seldom meant."""
    place = subset.metadata_file or subset.image_dir
    rotated = sum(one.rotated for one in seen)
    if rotated:
        text = "%s: %s asked by EXIF data to be turned: pass --exif_transpose to train them upright"
        logger.warning(text, place, f"{counted(rotated, 'image')} {'is' if rotated == 1 else 'are'}")
    shared = sum(one.image.shares_name for one in seen)
    if shared:
        text = "%s: %s named alike except for the extension: they share captions, and caches of the second carry it"
        logger.warning(text, place, f"{shared} images are")
    stated = [one for one in seen if one.image.size not in (None, one.size)]
    if stated:
        text = "%s: image_size of %s differs from the file (%s): the file's is taken"
        names = some([f"{one.image.key}: {one.image.size}, not {one.size}" for one in stated[:_BAD_SHOWN]])
        logger.warning(text, place, counted(len(stated), "image"), names)


# control images


def _find_controls(subset: SubsetPlan, listed: Sequence[Listed]) -> tuple[dict[Path, Path], list[Problem]]:
    """Control image of each image, by equal stem, and those that have none."""
    place = subset.conditioning_data_dir
    if place is None:
        return {}, []
    try:
        folder = Folder(place)
    except OSError:
        return {}, [Problem("conditioning_data_dir", "no such folder; correct the path", str(place))]
    found = {one.path: place / folder.first[one.path.stem] for one in listed if one.path.stem in folder.first}
    missing = [one.key for one in listed if one.path not in found]
    if not missing:
        return found, []
    text = f"{counted(len(missing), 'image')} without control image: {some(missing)}"
    advice = "add images of the same name, any extension, to the folder, or remove these from the training images"
    return found, [Problem("conditioning_data_dir", f"{text}; {advice}", str(place))]


def _controls_without_image(listings: Sequence[tuple[SubsetPlan, list[Listed]]]) -> Iterable[Problem]:
    """Control images that no subset uses; several may share a folder, and metadata files may list a part of it."""
    stems: dict[Path, set[str]] = defaultdict(set)
    unknown: set[Path] = set()
    for subset, listed in listings:
        if subset.conditioning_data_dir is None:
            continue
        stems[subset.conditioning_data_dir] |= {one.path.stem for one in listed}
        if subset.metadata_file is not None or not listed:
            unknown.add(subset.conditioning_data_dir)
    for place, known in stems.items():
        if place in unknown or not place.is_dir():
            continue
        extra = [name for name in Folder(place).images if os.path.splitext(name)[0] not in known]
        if extra:
            text = f"{counted(len(extra), 'control image')} without image: {some(extra)}"
            yield Problem("conditioning_data_dir", f"{text}; add their images or remove them", str(place))


def _with_control(seen: _Seen, control: Path | None, rules: ScanRules) -> _Seen:
    """With its control image, whose faults make the image unusable."""
    if control is None or seen.fault:
        return seen
    try:
        size, _ = _header(control, rules)
    except (OSError, ValueError) as error:
        return replace(seen, fault=f"has a control image that {_reason(error, control)} ({control})")
    return replace(seen, control=control, control_size=size)


def _control_sizes(seen: Sequence[_Seen]) -> list[Problem]:
    wrong = [
        f"{one.control} is {_by(one.control_size)}, {one.image.key} {_by(one.size)}"
        for one in seen
        if one.control is not None and one.control_size != one.size
    ]
    if not wrong:
        return []
    text = f"a control image must have the size of its image; resize {counted(len(wrong), 'control image')}"
    return [Problem("conditioning_data_dir", f"{text}: {some(wrong)}")]


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


# sizes kept between runs


class _Info:
    """`metadata_cache.json` of a folder: sizes of images, trusted as long as the files are the same.

    The entries `{path: {"caption", "resolution"}}` are those of sd-scripts; ours say what file they describe as well.
    """

    def __init__(self, subset: SubsetPlan, rules: ScanRules) -> None:
        assert subset.image_dir is not None
        self.path = subset.image_dir / INFO_FILE
        self.rules = rules
        self.merge = subset.metadata_file is not None  # several of these may list images of the folder
        self.entries: dict[str, Any] = {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, dict):
                raise ValueError("expected a JSON object")
            self.entries = content
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged and will be made again (%s)", self.path, _reason(error, self.path))

    def noted(self, path: Path, stamp: tuple[int, int]) -> tuple[Size, bool] | None:
        """Size and unheeded turn of an image, if the entry was made from this very file under the same rules."""
        entry = self.entries.get(str(path))
        if not isinstance(entry, dict) or (entry.get("file_size"), entry.get("mtime_ns")) != stamp:
            return None
        size = entry.get("resolution")
        if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
            return None
        if entry.get("exif_transpose") is not self.rules.exif_transpose:
            return None
        return (size[0], size[1]), bool(entry.get("rotated"))

    def write(self, seen: Sequence[_Seen], records: Sequence[ImageRecord]) -> None:
        """Keep what is known now; a folder that cannot be written to only costs time later."""
        made = {
            str(record.path): {
                "caption": record.caption,
                "resolution": list(record.size),
                "file_size": one.stamp[0],
                "mtime_ns": one.stamp[1],
                "exif_transpose": self.rules.exif_transpose,
                "rotated": one.rotated,
            }
            for one, record in zip(seen, records)
            if record.exists
        }
        content = {**self.entries, **made} if self.merge else made
        if content == self.entries or not self.rules.write_info:
            return
        try:
            write_text_atomic(self.path, json.dumps(content, ensure_ascii=False, indent=2))
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be written, sizes are read again next time: %s", self.path, error)
