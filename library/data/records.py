"""Find images and captions. Only headers are read here."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from library.base.errors import Problem, UserError
from library.base.logs import logger
from library.config_util import SubsetPlan

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_EXTENSIONS = (".txt", ".caption", ".captions", ".tags")
MISSING_SHARE = 0.1  # more missing captions than this stop the run


@dataclass(frozen=True)
class ImageRecord:
    """One image file.

    Attributes:
        path: the file.
        key: its path below the subset's folder, with forward slashes.
        subset: index of its subset in the dataset.
        size: (width, height) in pixels.
        caption: text of its caption file, or what stands in for it.
    """

    path: Path
    key: str
    subset: int
    size: tuple[int, int]
    caption: str


def scan_subset(subset: SubsetPlan, index: int) -> tuple[list[ImageRecord], list[Problem], int]:
    """All images of a subset, in the order of their names.

    Returns:
        records, problems (missing folder, unreadable headers, empty or undecodable captions), number without caption.
    """
    folder = subset.image_dir
    if not folder.is_dir():
        return [], [Problem("image_dir", "no such folder", str(folder))], 0
    paths = sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not paths:
        found = Counter(path.suffix or "files without extension" for path in folder.iterdir() if path.is_file())
        detail = "; it holds " + ", ".join(f"{count} {name}" for name, count in found.items()) if found else ""
        known = ", ".join(EXTENSIONS)
        return [], [Problem("image_dir", f"holds no images ({known}){detail}", str(folder))], 0
    problems: list[Problem] = []
    records: list[ImageRecord] = []
    missing = 0
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_read_size, paths))
    for path, size in zip(paths, sizes):
        if isinstance(size, str):
            problems.append(Problem(str(path), size))
            continue
        try:
            caption = _read_caption(path, subset)
        except ValueError as error:
            problems.append(Problem(str(path.with_suffix(subset.caption_extension)), str(error)))
            continue
        missing += caption is None and subset.class_tokens is None
        text = caption if caption is not None else subset.class_tokens or ""
        records.append(ImageRecord(path, path.name, index, size, text))
    return records, problems, missing


def _read_size(path: Path) -> tuple[int, int] | str:
    """Width and height from the header, or what is wrong with the file."""
    try:
        if path.stat().st_size == 0:
            return "is empty (zero bytes)"
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError:
        return "is not an image, whatever its name says"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read: {error}"


def _read_caption(path: Path, subset: SubsetPlan) -> str | None:
    """The caption of an image: its first line, or with wildcards all lines that hold text; None without a file."""
    file = path.with_suffix(subset.caption_extension)
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("is an empty caption; write a caption or delete the file")
    return "\n".join(lines) if subset.captions.enable_wildcard else lines[0]


def caption_problems(
    subset: SubsetPlan, records: Sequence[ImageRecord], missing: int, *, allowed: bool
) -> Iterable[Problem]:
    """A subset in which many captions are missing is usually a mistake."""
    if not missing:
        return
    others = [
        extension
        for extension in CAPTION_EXTENSIONS
        if extension != subset.caption_extension and any(r.path.with_suffix(extension).is_file() for r in records)
    ]
    text = f"{missing} of {len(records)} images in {subset.image_dir} have no {subset.caption_extension} caption"
    hint = f'; captions ending in {others[0]} are there: set caption_extension = "{others[0]}"' if others else ""
    if not allowed and (others or missing > MISSING_SHARE * len(records)):
        yield Problem(
            "caption_extension", f"{text}{hint}, or pass --allow_missing_captions to train them on empty text"
        )
    else:
        logger.warning("%s%s; they are trained on empty text", text, hint)


def scan_dataset(
    subsets: Sequence[SubsetPlan], *, where: str, allow_missing_captions: bool
) -> tuple[list[ImageRecord], list[Problem]]:
    """Records of all subsets of a dataset, and everything that is wrong with them."""
    records: list[ImageRecord] = []
    problems: list[Problem] = []
    for index, subset in enumerate(subsets):
        found, wrong, missing = scan_subset(subset, index)
        place = f"{where}.subsets[{index}]"
        problems += [Problem(f"{place}: {p.where}", p.message, p.value) for p in wrong]
        problems += [
            Problem(f"{place}.{p.where}", p.message)
            for p in caption_problems(subset, found, missing, allowed=allow_missing_captions)
        ]
        records += found
    if not records and not problems:
        raise UserError(where, message="no images were found")
    return records, problems
