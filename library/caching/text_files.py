"""Text encoder outputs on disk: one file per image, with one entry per text.

The first text's arrays have the plain names of the family's layout; further texts (caption variants) add the first
eight digits of their digest. Ours add `caption_...` and `recipe_...`: the digests of text and settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.caching.files import FORMATS, CacheDamaged, CacheFile, write_cache
from library.caching.fingerprints import as_tensor, digest
from library.caching.latent_files import Status

# where the encoding of the empty text lies: one file per folder, hidden like all files that begin with a dot
EMPTY = ".empty_caption"
_DTYPES = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How a family stores text encoder outputs.

    Attributes:
        suffix: e.g. "_flux_te".
        arrays: name -> "float", "int64", "int32" or "bool".
        flags: arrays without dimensions that must have this run's value.
        format: of new files: "npz" or "safetensors".
    """

    suffix: str
    arrays: Mapping[str, str]
    flags: Mapping[str, bool | float]
    format: str = "npz"

    def path(self, base: str, file_format: str | None = None) -> Path:
        """Name of an image's file."""
        return Path(f"{base}{self.suffix}.{file_format or self.format}")

    def candidates(self, base: str) -> Iterator[Path]:
        """Files that may hold the entries, the preferred one first."""
        yield self.path(base)
        yield from (self.path(base, other) for other in FORMATS if other != self.format)


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """The entries that a run needs of one file.

    Attributes:
        base: path that the file's name begins with.
        texts: as the model will see them; the first has the plain array names.
        recipe: digest of encoders and settings.
    """

    base: str
    texts: tuple[str, ...]
    recipe: tuple[int, int]

    def key(self, text: str) -> str:
        """End of the names of a text's arrays."""
        return "" if text == self.texts[0] else f"_{digest(text)[0] & 0xFFFF_FFFF:08x}"


@dataclass(frozen=True)
class FoundText:
    """Where the entries are; texts that have to be encoded."""

    status: Status
    path: Path | None
    missing: tuple[str, ...]


def find_text(layout: TextLayout, request: TextRequest, *, trust: bool = False, verify: bool = False) -> FoundText:
    """Look for the entries of a request; see `latent_files.find`."""
    best = FoundText(Status.MISSING, None, request.texts)
    for path in layout.candidates(request.base):
        if not path.is_file():
            continue
        if trust:
            return FoundText(Status.UNKNOWN, path, ())
        try:
            with CacheFile(path) as file:
                found = _judge(file, layout, request)
                if verify:
                    file.verify()
        except CacheDamaged:
            found = FoundText(Status.DAMAGED, path, request.texts)
        if found.status.usable:
            return found
        if best.status is Status.MISSING:
            best = found
    return best


def _judge(file: CacheFile, layout: TextLayout, request: TextRequest) -> FoundText:
    found = {text: _judge_one(file, layout, request, text) for text in request.texts}
    missing = tuple(text for text, status in found.items() if not status.usable)
    statuses = set(found.values())
    for status in (Status.STALE, Status.MISSING, Status.UNKNOWN):
        if status in statuses:
            return FoundText(status, file.path, missing)
    return FoundText(Status.VALID, file.path, ())


def _judge_one(file: CacheFile, layout: TextLayout, request: TextRequest, text: str) -> Status:
    key = request.key(text)
    if not all(f"{name}{key}" in file for name in layout.arrays):
        return Status.MISSING
    for name, value in layout.flags.items():
        if file.read(f"{name}{key}").item() != value:
            return Status.STALE
    if f"caption{key}" not in file or f"recipe{key}" not in file:
        # a file without fingerprints can only be taken for the one text of its image
        return Status.UNKNOWN if len(request.texts) == 1 else Status.STALE
    same = tuple(file.read(f"caption{key}").tolist()) == digest(text)
    return Status.VALID if same and tuple(file.read(f"recipe{key}").tolist()) == request.recipe else Status.STALE


def read_text(layout: TextLayout, path: Path, key: str) -> dict[str, Tensor]:
    """The arrays of one text, in the number formats of the layout.

    Raises:
        CacheDamaged: the file changed since it was looked at.
    """
    try:
        with CacheFile(path) as file:
            return {name: file.read(f"{name}{key}") for name in layout.arrays if name not in layout.flags}
    except KeyError as error:
        raise CacheDamaged(f"{path} lacks {error}") from error


def write_text(layout: TextLayout, request: TextRequest, outputs: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the outputs of some texts; those of the request that the file has and that are right stay.

    Args:
        layout: of the family.
        request: all texts of the file.
        outputs: text -> arrays.
    """
    path = layout.path(request.base)
    arrays = _kept(path, layout, request, [text for text in request.texts if text not in outputs])
    for text, values in outputs.items():
        key = request.key(text)
        for name, kind in layout.arrays.items():
            value = values[name]
            arrays[f"{name}{key}"] = value.to(_DTYPES[kind]) if kind in _DTYPES else value
        arrays[f"caption{key}"] = as_tensor(digest(text))
        arrays[f"recipe{key}"] = as_tensor(request.recipe)
    write_cache(path, arrays)
    return path


def _kept(path: Path, layout: TextLayout, request: TextRequest, texts: Sequence[str]) -> dict[str, Tensor]:
    if not texts or not path.is_file():
        return {}
    try:
        with CacheFile(path) as file:
            names = [f"{name}{request.key(text)}" for text in texts for name in (*layout.arrays, "caption", "recipe")]
            # copies: some systems cannot replace a file that is still mapped
            return {name: file.read(name).clone() for name in names}
    except (CacheDamaged, KeyError):
        return {}
