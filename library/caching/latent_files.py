"""Latents on disk: names of files and arrays, what makes an entry usable, reading and writing.

One file per image, one entry per trained size: `latents_{h}x{w}`, `original_size_...`, `crop_ltrb_...`, and where asked
for `latents_flipped_...` and `alpha_mask_...`, h and w being the latents' size. Ours add `source_...` and `recipe_...`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from library.caching.files import FORMATS, CacheDamaged, CacheFile, write_cache
from library.caching.fingerprints import Source, as_tensor


class Status(Enum):
    """What was found for an entry."""

    VALID = "ready"
    UNKNOWN = "ready, made elsewhere"  # no fingerprint: taken as it is
    MISSING = "missing"
    STALE = "out of date"
    DAMAGED = "damaged"

    @property
    def usable(self) -> bool:
        """Whether nothing has to be encoded."""
        return self in (Status.VALID, Status.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """How a family and a run name and store latents.

    Attributes:
        suffix: e.g. "_flux".
        channels: of the latents.
        unsized: whether older files name their arrays without the size, and may lack size and suffix in their own name.
        format: of new files: "npz" or "safetensors".
    """

    suffix: str
    channels: int
    unsized: bool = False
    format: str = "npz"

    def path(self, base: str, size: tuple[int, int], file_format: str | None = None) -> Path:
        """Name of the file of an image of (width, height) pixels."""
        return Path(f"{base}_{size[0]:04d}x{size[1]:04d}{self.suffix}.{file_format or self.format}")

    def candidates(self, base: str, size: tuple[int, int]) -> Iterator[Path]:
        """Files that may hold an entry, the preferred one first."""
        yield self.path(base, size)
        yield from (self.path(base, size, other) for other in FORMATS if other != self.format)
        if self.unsized:
            yield Path(f"{base}.npz")

    def suffixes(self) -> tuple[str, ...]:
        """Ends of the names of files."""
        return tuple(f"{self.suffix}.{file_format}" for file_format in FORMATS)


@dataclass(frozen=True, kw_only=True)
class LatentRequest:
    """One entry that a run needs.

    Attributes:
        base: path that the file's name begins with.
        image: the image file; None when only its cache is left.
        size: of the image (width, height).
        latent_size: (height, width) of the latents.
        stated_crop: left, top, right, bottom as caches state it.
        flipped: whether the mirrored image's latents are needed too.
        alpha_mask: whether the alpha channel is needed.
        recipe: digest of everything but the image that the latents depend on.
    """

    base: str
    image: Path | None
    size: tuple[int, int]
    latent_size: tuple[int, int]
    stated_crop: tuple[float, float, float, float]
    flipped: bool
    alpha_mask: bool
    recipe: tuple[int, int]

    @property
    def key(self) -> str:
        """End of the names of the entry's arrays."""
        return f"_{self.latent_size[0]}x{self.latent_size[1]}"


@dataclass(frozen=True)
class LatentEntry:
    """Latents of one image [C, H, W], of its mirror, and its alpha channel [h, w] in 0..1; None where not asked for."""

    latents: Tensor
    flipped: Tensor | None
    alpha_mask: Tensor | None


@dataclass(frozen=True)
class Found:
    """Where an entry is: the file, and the end of its array names."""

    status: Status
    path: Path | None = None
    key: str = ""


def find(layout: LatentLayout, request: LatentRequest, *, trust: bool = False, verify: bool = False) -> Found:
    """Look for an entry.

    Args:
        layout: of the family.
        request: the entry.
        trust: an existing file is taken without opening it.
        verify: compare checksums too.
    """
    worst = Found(Status.MISSING)
    for path in layout.candidates(request.base, request.size):
        if not path.is_file():
            continue
        if trust:
            return Found(Status.UNKNOWN, path, request.key)
        try:
            with CacheFile(path) as file:
                found = _judge(file, layout, request)
                if verify and found.status.usable:
                    file.verify()
        except CacheDamaged:
            found = Found(Status.DAMAGED, path)
        if found.status.usable:
            return found
        if worst.status is Status.MISSING:
            worst = found
    return worst


def _judge(file: CacheFile, layout: LatentLayout, request: LatentRequest) -> Found:
    """Whether an open file holds the entry, with the right shapes and made from the same things."""
    shape = (layout.channels, *request.latent_size)
    keys = (request.key, "") if layout.unsized else (request.key,)
    key = next((k for k in keys if _squeezed(file.shapes.get(f"latents{k}")) == shape), None)
    if key is None:
        return Found(Status.MISSING, file.path)
    needed = ["latents"] + ["latents_flipped"] * request.flipped + ["alpha_mask"] * request.alpha_mask
    if not all(f"{name}{key}" in file for name in needed):
        return Found(Status.STALE, file.path)
    if f"recipe{key}" not in file or f"source{key}" not in file:
        return Found(Status.UNKNOWN, file.path, key)
    if tuple(file.read(f"recipe{key}").tolist()) != request.recipe:
        return Found(Status.STALE, file.path)
    if request.image is not None and not Source.from_tensor(file.read(f"source{key}")).matches(request.image):
        return Found(Status.STALE, file.path)
    return Found(Status.VALID, file.path, key)


def _squeezed(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """[C, 1, H, W], as video autoencoders give it, is [C, H, W]."""
    return shape if shape is None or len(shape) != 4 or shape[1] != 1 else (shape[0], *shape[2:])


def read_entry(found: Found, *, flipped: bool, alpha_mask: bool) -> LatentEntry:
    """An entry in float32; only what is asked for is read.

    Args:
        found: where it is.
        flipped: read the mirrored latents instead of the others.
        alpha_mask: read the mask too.

    Raises:
        CacheDamaged: the file changed since it was looked at.
    """
    assert found.path is not None
    name = f"latents_flipped{found.key}" if flipped else f"latents{found.key}"
    try:
        with CacheFile(found.path) as file:
            latents = file.read(name).float()
            mask = file.read(f"alpha_mask{found.key}").float() if alpha_mask else None
    except KeyError as error:
        raise CacheDamaged(f"{found.path} lacks {error}") from error
    return LatentEntry(latents.squeeze(1) if latents.ndim == 4 else latents, None, mask)


def write_entry(layout: LatentLayout, request: LatentRequest, entry: LatentEntry, source: Source) -> Path:
    """Write an entry; entries of other sizes in the same file are kept."""
    path = layout.path(request.base, request.size)
    arrays = _others(path, request.key)
    key = request.key
    arrays |= {
        f"latents{key}": entry.latents.float(),
        f"original_size{key}": as_tensor(request.size),
        f"crop_ltrb{key}": torch.tensor(request.stated_crop, dtype=torch.float64),
    }
    if entry.flipped is not None:
        arrays[f"latents_flipped{key}"] = entry.flipped.float()
    if entry.alpha_mask is not None:
        arrays[f"alpha_mask{key}"] = entry.alpha_mask.float()
    arrays |= {f"source{key}": source.tensor(), f"recipe{key}": as_tensor(request.recipe)}
    write_cache(path, arrays)
    return path


def _others(path: Path, key: str) -> dict[str, Tensor]:
    """Arrays of an existing file that do not belong to the entry; of a damaged file nothing."""
    if not path.is_file():
        return {}
    try:
        with CacheFile(path) as file:
            # copies: some systems cannot replace a file that is still mapped
            return {name: file.read(name).clone() for name in file.shapes if not name.endswith(key)}
    except CacheDamaged:
        return {}
