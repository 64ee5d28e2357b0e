"""Metadata files: images, captions and sizes listed in one file instead of a folder with text files.

`.jsonl` holds one object per line with `image_path`; any other name holds one JSON object `{image path: {...}}`.
Entries have `caption`, `tags` (text), `image_size` ([width, height]) or `width` and `height`, which win; other keys are
ignored.
"""

import json
import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import Problem
from library.config_util import CaptionRules, SubsetPlan
from library.data import images

NAMES_SHOWN = 10
# a name that ends otherwise has no extension, only a dot: "mix_v1.5" must not be taken for an image "mix_v1"
_IMAGE_LIKE = frozenset((".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".tga", ".avif", ".jxl", ".psd", ".ppm"))
_SIZED = re.compile(r"(.+)_(\d{4,})x(\d{4,})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Listed:
    """An image that a folder or a metadata file names; nothing was read from it yet.

    Attributes:
        path: the file.
        key: its path below the subset's folder, with forward slashes.
        cache_base: what names of its cache files begin with.
        shares_name: whether another image of the folder has the same name before the extension.
        exists: whether the image is there; else `size` is that of its latent cache.
        caption: from a metadata file; None: without one.
        size: (width, height) as a metadata file or the name of a cache says.
    """

    path: Path
    key: str
    cache_base: str
    shares_name: bool = False
    exists: bool = True
    caption: str | None = None
    size: tuple[int, int] | None = None


class Folder:
    """What lies in one folder, looked up once.

    Args:
        path: the folder.
        latent_suffixes: ends of the names of latent caches to look for.

    Attributes:
        images: names of readable images, sorted as plain text; hidden files are left out.
        first: stem -> the first image with that stem.
        shared: stems of several images.
        caches: stem -> sizes that names of its latent caches state.
        rest: how many other files there are, by extension.
        folders: number of folders inside.

    Raises:
        OSError: the folder is missing or cannot be listed.
    """

    def __init__(self, path: Path, latent_suffixes: Sequence[str] = ()) -> None:
        readable = images.extensions()
        self.path = path
        self.images: list[str] = []
        self.caches: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.rest: Counter[str] = Counter()
        self.folders = 0
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if suffix in readable:
                    self.images.append(entry.name)
                elif _is_folder(entry):
                    self.folders += 1
                else:
                    self.rest[suffix or "without extension"] += 1
                    self._note_cache(entry.name, latent_suffixes)
        self.images.sort()
        self.first: dict[str, str] = {}
        self.shared: set[str] = set()
        for name in self.images:
            stem = os.path.splitext(name)[0]
            if self.first.setdefault(stem, name) != name:
                self.shared.add(stem)

    def _note_cache(self, name: str, suffixes: Sequence[str]) -> None:
        for suffix in suffixes:
            if name.endswith(suffix) and (match := _SIZED.fullmatch(name[: -len(suffix)])):
                self.caches[match[1]].add((int(match[2]), int(match[3])))

    def listed(self, name: str, key: str, **more: Any) -> Listed:
        """An image of this folder. The first of several with the same stem owns the cache names without extension."""
        path = self.path / name
        stem = os.path.splitext(name)[0]
        base = os.path.splitext(path)[0] if self.first.get(stem, name) == name else str(path)
        return Listed(path, key, base, stem in self.shared, **more)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def some(names: Sequence[str]) -> str:
    """Up to ten of the names, and how many there are in all."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun[:-1]}ies" if noun[-1] == "y" else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class _Entry:
    place: str  # "line 3" or the key, for messages
    key: str
    caption: str | None
    size: tuple[int, int] | None


def list_metadata(subset: SubsetPlan, latent_suffixes: Sequence[str]) -> tuple[list[Listed], list[Problem]]:
    """The images of a metadata file, in its order, and what is wrong with the file.

    Relative names lie below `image_dir`. A name without extension, or whose file is gone, stands for the first image of
    that stem in its folder, and without one for the latent cache of exactly that stem.

    Args:
        subset: has a `metadata_file`.
        latent_suffixes: ends of the names of latent caches.
    """
    file = subset.metadata_file
    assert file is not None
    entries, problems = _read_entries(file, subset.captions)
    if not entries and not problems:
        return [], [Problem(str(file), "lists no images; write entries or remove the subset")]
    relative = [entry for entry in entries if not os.path.isabs(entry.key)]
    if relative and subset.image_dir is None:
        text = f"{counted(len(relative), 'relative path')} ({some([entry.key for entry in relative])})"
        return [], [*problems, Problem(str(file), f"has {text}: set image_dir to the folder they start from")]
    if relative and subset.image_dir is not None and not subset.image_dir.is_dir():
        return [], [*problems, Problem("image_dir", "no such folder; correct the path", str(subset.image_dir))]
    finder = _Finder(file, subset.image_dir, latent_suffixes)
    listed = [found for entry in entries if (found := finder.find(entry)) is not None]
    return listed, [*problems, *finder.problems()]


def _read_entries(file: Path, rules: CaptionRules) -> tuple[list[_Entry], list[Problem]]:
    """All entries that are well formed, and a problem for each other one."""
    problems: list[Problem] = []
    entries: list[_Entry] = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return [], [Problem("metadata_file", "no such file; correct the path", str(file))]
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        return [], [Problem(str(file), message)]
    except OSError as error:
        return [], [Problem(str(file), f"cannot be read: {error.strerror}; expected a JSON or JSON Lines file")]
    parse = _json_lines if file.suffix.lower() == ".jsonl" else _json_object
    for place, key, values in parse(text):
        where = f"{file}: {place}" if place else str(file)
        if isinstance(values, str):
            problems.append(Problem(where, values))
            continue
        try:
            entries.append(_Entry(place, key, _caption(values, rules), _stated_size(values)))
        except ValueError as error:
            problems.append(Problem(where, str(error)))
    return entries, problems


_Parsed = Iterator[tuple[str, str, Mapping[str, Any] | str]]


class _Repeated(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of equal keys, JSON readers silently keep the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise _Repeated(f"has keys that are there twice: {some(twice)}; keep one of each")
    return made


def _json_lines(text: str) -> _Parsed:
    """Place, key and values of each line, or what is wrong with it."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            values = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            yield place, "", f"is damaged JSON: {error.msg} at column {error.colno}; expected one object per line"
            continue
        except _Repeated as error:
            yield place, "", str(error)
            continue
        if not isinstance(values, dict):
            yield place, "", f'expected an object as {{"image_path": "a.png", "caption": "..."}}, not {_short(values)}'
        elif not isinstance(values.get("image_path"), str) or not values["image_path"]:
            yield place, "", f"image_path: expected the path of an image, not {_short(values.get('image_path'))}"
        else:
            yield place, values["image_path"], values


def _json_object(text: str) -> _Parsed:
    try:
        content = json.loads(text, object_pairs_hook=_unique) if text.strip() else {}
    except json.JSONDecodeError as error:
        yield f"line {error.lineno}", "", f"is damaged JSON: {error.msg} at column {error.colno}; repair the file"
        return
    except _Repeated as error:
        yield "", "", str(error)
        return
    if not isinstance(content, dict):
        yield "", "", f'expected an object as {{"a.png": {{"caption": "..."}}}}, not {_short(content)}'
        return
    for key, values in content.items():
        if not key:
            yield "''", "", "expected the path of an image as key"
        elif isinstance(values, dict):
            yield repr(key), key, values
        else:
            yield repr(key), "", f'expected an object as {{"caption": "..."}}, not {_short(values)}'


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: expected text, not {_short(value)}")
    return (value or "").replace("\r\n", "\n")


def _caption(values: Mapping[str, Any], rules: CaptionRules) -> str | None:
    """Caption and tags joined by the separator; with wildcards every line of the caption gets the tags."""
    caption, tags = _text(values, "caption"), _text(values, "tags").strip("\n")
    tags = tags.replace("\n", rules.caption_separator)
    lines = [line for line in caption.split("\n") if line.strip()]
    if not rules.enable_wildcard:
        lines = lines[:1]  # as of caption files
    if tags.strip():
        # without a caption the tags are the text
        lines = [f"{line}{rules.caption_separator}{tags}" for line in lines] or [tags]
    return "\n".join(line.strip() for line in lines) or None


def _stated_size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    sides = [values.get("width"), values.get("height")]
    name = "width and height"
    if sides == [None, None]:
        if values.get("image_size") is None:
            return None
        name, sides = "image_size", values["image_size"]
    # bool is an int for isinstance
    if not isinstance(sides, list) or len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"{name}: expected width and height as whole numbers of pixels above 0, not {_short(sides)}")
    return sides[0], sides[1]


class _Finder:
    """Finds the files that entries stand for. Every folder is listed once, however many entries point there."""

    def __init__(self, file: Path, image_dir: Path | None, latent_suffixes: Sequence[str]) -> None:
        self.file = file
        self.image_dir = image_dir
        self.latent_suffixes = latent_suffixes
        self._root = os.path.join(os.path.abspath(image_dir), "") if image_dir is not None else None
        self._folders: dict[Path, Folder | None] = {}
        self._seen: dict[str, str] = {}  # file -> the key that named it
        self._missing: list[str] = []
        self._unsure: list[str] = []
        self._twice: list[str] = []
        self._formats: dict[str, list[str]] = defaultdict(list)  # package -> keys

    def problems(self) -> list[Problem]:
        """What went wrong so far: one problem for each kind."""
        file = str(self.file)
        found = []
        if self._missing:
            text = counted(len(self._missing), "entry") + " without image or latent cache"
            found.append(
                Problem(file, f"{text}: {some(self._missing)}; correct the paths (or image_dir) or remove the entries")
            )
        if self._unsure:
            text = counted(len(self._unsure), "entry") + " without image and with latent caches of several sizes"
            found.append(Problem(file, f"{text}: {some(self._unsure)}; add image_size to say which"))
        if self._twice:
            text = (
                f"{some(self._twice)}: the same image twice; keep one entry, and use num_repeats to see it more often"
            )
            found.append(Problem(file, text))
        for package, keys in self._formats.items():
            text = f"{counted(len(keys), 'image')} in a format that this installation cannot read ({some(keys)})"
            found.append(Problem(file, f"{text}; run: pip install {shlex.quote(package)}"))
        return found

    def find(self, entry: _Entry) -> Listed | None:
        """The image or cache of an entry; None after noting why there is none."""
        path = Path(entry.key)
        if not path.is_absolute():
            assert self.image_dir is not None
            path = self.image_dir / path
        folder = self._folder(path.parent)
        name = _image_of(folder, path.name) if folder is not None else None
        if folder is None or name is None:
            listed = self._without_image(entry, path, folder)
        else:
            listed = folder.listed(name, self._key(folder.path / name), caption=entry.caption, size=entry.size)
        if listed is None:
            return None
        real = os.path.abspath(listed.path)
        if real in self._seen:
            first = self._seen[real]
            self._twice.append(entry.key if first == entry.key else f"{entry.key} (also {first})")
            return None
        self._seen[real] = entry.key
        return listed

    def _without_image(self, entry: _Entry, path: Path, folder: Folder | None) -> Listed | None:
        package = images.optional_formats().get(path.suffix.lower())
        for stem in dict.fromkeys((path.name, *_stems(path.name))):
            sizes = folder.caches.get(stem) if folder is not None else None
            if sizes and entry.size is None and len(sizes) > 1:
                self._unsure.append(entry.key)
                return None
            if sizes and (entry.size is None or entry.size in sizes):
                base = str(path.parent / stem)
                size = entry.size or next(iter(sizes))
                return Listed(path, self._key(path), base, exists=False, caption=entry.caption, size=size)
        if package is not None and path.is_file():
            self._formats[package].append(entry.key)
        else:
            self._missing.append(entry.key)
        return None

    def _folder(self, path: Path) -> Folder | None:
        if path not in self._folders:
            try:
                self._folders[path] = Folder(path, self.latent_suffixes)
            except OSError:
                self._folders[path] = None
        return self._folders[path]

    def _key(self, path: Path) -> str:
        full = os.path.abspath(path)
        if self._root is not None and full.startswith(self._root):
            return full[len(self._root) :].replace(os.sep, "/")
        return path.name


def _stems(name: str) -> Iterator[str]:
    """What images and caches of an entry may be named before their extension."""
    stem, suffix = os.path.splitext(name)
    known = suffix.lower() in (*images.extensions(), *images.optional_formats()) or suffix.lower() in _IMAGE_LIKE
    yield stem if known else name


def _image_of(folder: Folder, name: str) -> str | None:
    """The image that an entry names: the file itself, else the first with its stem."""
    stem = next(_stems(name))
    suffix = os.path.splitext(name)[1].lower()
    if suffix in images.extensions() and (folder.path / name).is_file():
        return name
    if stem in folder.first:
        return folder.first[stem]
    # a file of a format that folders are not searched for, but that is named here
    return name if suffix in _IMAGE_LIKE - set(images.optional_formats()) and (folder.path / name).is_file() else None
