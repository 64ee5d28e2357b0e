"""Encode all images once, before training: into memory, or into files beside the images."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from library.base.errors import Problem, UserError, raise_problems
from library.base.logs import logger
from library.batch import ItemAddress
from library.caching.files import CacheDamaged
from library.caching.fingerprints import Source, digest
from library.caching.latent_files import (
    Found,
    LatentEntry,
    LatentLayout,
    LatentRequest,
    Status,
    find,
    read_entry,
    write_entry,
)
from library.caching.pipeline import overlap
from library.data.buckets import stated_crop
from library.data.dataset import TrainDataset, View, to_mask
from library.data.images import to_unit_range

Key = tuple[int, int]  # dataset, record
_MANY = 500  # files from which looking at them gets a progress bar


class Encoder(Protocol):
    """What turns images into latents."""

    def encode(self, images: Tensor, items: Sequence[ItemAddress]) -> Tensor:
        """[B, 3, h, w] -> [B, C, H, W]."""
        ...


class _Piece(NamedTuple):
    """Images of one size that are encoded together, and which of them are needed mirrored."""

    items: list[ItemAddress]
    flipped: list[bool]


class _Read(NamedTuple):
    images: Tensor
    mirrored: Tensor | None
    masks: list[np.ndarray | None]


def all_items(dataset: TrainDataset) -> Iterator[ItemAddress]:
    """Every image once."""
    for number, images in enumerate(dataset.sets):
        for index, record in enumerate(images.records):
            yield ItemAddress(number, record.subset, index, record.key, 0, 0)


def _pieces(dataset: TrainDataset, items: Sequence[ItemAddress], size: int) -> list[_Piece]:
    """Groups of at most `size` images of the same bucket; images that are mirrored keep to themselves."""
    groups: dict[tuple[tuple[int, int], bool], list[ItemAddress]] = defaultdict(list)
    for item in items:
        groups[dataset.placement(item).bucket, dataset.subset(item).flip_aug].append(item)
    return [
        _Piece(members[start : start + size], [flip] * len(members[start : start + size]))
        for (_, flip), members in sorted(groups.items())
        for start in range(0, len(members), size)
    ]


def _read_piece(dataset: TrainDataset, piece: _Piece, *, control: bool) -> _Read:
    views: list[View] = [dataset.view(item, False, control=control) for item in piece.items]
    pixels = [view.pixels for view in views if view.pixels is not None]
    images = torch.from_numpy(np.stack([to_unit_range(part) for part in pixels]))
    mirrored = None
    if any(piece.flipped):
        mirrored = torch.from_numpy(np.stack([to_unit_range(part[:, ::-1]) for part in pixels]))
    return _Read(images, mirrored, [view.mask for view in views])


def _encode(encoder: Encoder, piece: _Piece, read: _Read) -> list[LatentEntry]:
    latents = encoder.encode(read.images, piece.items).cpu()
    mirrored = None if read.mirrored is None else encoder.encode(read.mirrored, piece.items).cpu()
    return [
        LatentEntry(
            latents[n].clone(),
            None if mirrored is None else mirrored[n].clone(),
            None if (mask := read.masks[n]) is None else to_mask(mask),
        )
        for n in range(len(piece.items))
    ]


class MemoryLatents:
    """Latents and masks of every image, in memory."""

    holds_masks = True

    def __init__(self, entries: Mapping[Key, LatentEntry]) -> None:
        self.entries = entries

    def read(self, item: ItemAddress, *, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """See LatentReader."""
        entry = self.entries[item.dataset, item.record]
        latents = entry.flipped if flipped else entry.latents
        assert latents is not None
        mask = entry.alpha_mask
        return latents, mask.flip(1) if flipped and mask is not None else mask


def cache_in_memory(
    dataset: TrainDataset, encoder: Encoder, *, batch_size: int, show_progress: bool = True
) -> MemoryLatents:
    """Encode every image of a dataset; decoding runs ahead while the encoder works."""
    entries: dict[Key, LatentEntry] = {}
    pieces = _pieces(dataset, list(all_items(dataset)), batch_size)

    def keep(piece: _Piece, made: list[LatentEntry]) -> None:
        entries.update({(item.dataset, item.record): entry for item, entry in zip(piece.items, made)})

    with _bar(sum(len(piece.items) for piece in pieces), "caching latents", "image", show_progress) as bar:
        overlap(
            pieces,
            lambda piece: _read_piece(dataset, piece, control=True),
            lambda piece, read: _encode(encoder, piece, read),
            keep,
            lambda piece: bar.update(len(piece.items)),
        )
    return MemoryLatents(entries)


def _bar(total: int, text: str, unit: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=text, unit=unit, disable=not show or not total, dynamic_ncols=True)


class LatentFiles:
    """The latent caches of a dataset on disk.

    Args:
        dataset: its images.
        layout: how files are named and laid out.
        factor: image pixels per latent pixel.
        recipe: what the latents depend on besides the image and its place: autoencoder, mode or sample.
    """

    def __init__(self, dataset: TrainDataset, layout: LatentLayout, factor: int, recipe: Sequence[object]) -> None:
        self.dataset = dataset
        self.layout = layout
        self.requests = {
            (item.dataset, item.record): self._request(item, factor, recipe) for item in all_items(dataset)
        }
        self.found: dict[Key, Found] = {}
        # several datasets may share a file: one process writes it
        paths = sorted({str(layout.path(request.base, request.size)) for request in self.requests.values()})
        self._number_of_path = {path: number for number, path in enumerate(paths)}

    def _request(self, item: ItemAddress, factor: int, recipe: Sequence[object]) -> LatentRequest:
        record, subset, place = self.dataset.record(item), self.dataset.subset(item), self.dataset.placement(item)
        settings = self.dataset.settings
        parts = (subset.resize_interpolation, place.resized, place.crop, settings.exif_transpose, settings.background)
        return LatentRequest(
            base=record.cache_base,
            image=record.path if record.exists else None,
            size=record.size,
            latent_size=(place.bucket[1] // factor, place.bucket[0] // factor),
            stated_crop=stated_crop(record.size, place.bucket),
            flipped=subset.flip_aug,
            alpha_mask=subset.alpha_mask,
            recipe=digest(*recipe, *parts),
        )

    def survey(self, *, trust: bool = False, verify: bool = False, show_progress: bool = True) -> None:
        """Look at every file; see `latent_files.find`.

        Raises:
            UserError: an image is gone and its cache does not serve.
        """
        keys = [key for key in self.requests if key not in self.found or not self.found[key].status.usable]
        show = show_progress and len(keys) >= _MANY
        with ThreadPoolExecutor(4) as pool, _bar(len(keys), "looking at latent caches", "file", show) as bar:
            looked = pool.map(
                lambda key: find(self.layout, self.requests[key], trust=trust, verify=verify), keys, chunksize=32
            )
            for key, found in zip(keys, looked):
                self.found[key] = found
                bar.update(1)
        raise_problems(
            Problem(str(self.requests[key].base), "the image is gone and no latent cache fits this run")
            for key in self.pending()
            if self.requests[key].image is None
        )

    def pending(self) -> list[Key]:
        """What has to be encoded."""
        return [key for key, found in self.found.items() if not found.status.usable]

    def report(self) -> str:
        """What was found, in words; damaged files are named in a warning."""
        counts = Counter(found.status for found in self.found.values())
        for found in self.found.values():
            if found.status is Status.DAMAGED:
                logger.warning("%s is damaged and will be made again", found.path)
        return ", ".join(f"{count} {status.value}" for status, count in counts.items()) or "no images"

    def fill(
        self, encoder: Encoder, *, batch_size: int, rank: int = 0, world_size: int = 1, show_progress: bool = True
    ) -> None:
        """Encode this rank's share of what is pending, and write it; reading, encoding and writing overlap.

        Raises:
            UserError: an image cannot be decoded, or a file cannot be written.
        """
        pending = set(self.pending())
        items = [
            item
            for item in all_items(self.dataset)
            if (key := (item.dataset, item.record)) in pending and self._owner(key) % world_size == rank
        ]
        pieces = _pieces(self.dataset, items, batch_size)

        def write(piece: _Piece, made: list[LatentEntry]) -> None:
            for item, entry in zip(piece.items, made):
                request = self.requests[item.dataset, item.record]
                assert request.image is not None
                try:
                    path = write_entry(self.layout, request, entry, Source.of(request.image))
                except OSError as error:
                    raise _cannot_write(self.layout.path(request.base, request.size), error) from error
                self.found[item.dataset, item.record] = Found(Status.VALID, path, request.key)

        with _bar(len(items), "caching latents", "image", show_progress) as bar:
            overlap(
                pieces,
                lambda piece: _read_piece(self.dataset, piece, control=False),
                lambda piece, read: _encode(encoder, piece, read),
                write,
                lambda piece: bar.update(len(piece.items)),
            )

    def _owner(self, key: Key) -> int:
        request = self.requests[key]
        return self._number_of_path[str(self.layout.path(request.base, request.size))]

    def reader(self) -> "DiskLatents":
        """Reads the entries.

        Raises:
            UserError: entries are missing: another process should have made them.
        """
        missing = self.pending()
        if missing:
            name = self.layout.path(self.requests[missing[0]].base, self.requests[missing[0]].size)
            raise UserError(str(name), message="another process should have made it; do all see the same folders?")
        masked = {key for key, request in self.requests.items() if request.alpha_mask}
        return DiskLatents(self.found, masked)


def _cannot_write(path: object, error: OSError) -> UserError:
    reason = error.strerror or error
    message = f"cannot be written: {reason}; make room, or use --cache_latents alone (memory)"
    return UserError(str(path), message=message)


class DiskLatents:
    """Reads latents from files; small enough to be sent to worker processes."""

    holds_masks = False

    def __init__(self, found: Mapping[Key, Found], masked: set[Key]) -> None:
        self.found = found
        self.masked = masked

    def read(self, item: ItemAddress, *, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """See LatentReader.

        Raises:
            UserError: the file was damaged or removed since the start.
        """
        key = item.dataset, item.record
        found = self.found[key]
        try:
            entry = read_entry(found, flipped=flipped, alpha_mask=key in self.masked)
        except CacheDamaged as error:
            message = f"cannot be read any more ({error}); start again, and it is made anew"
            raise UserError(str(found.path), message=message) from error
        mask = entry.alpha_mask
        return entry.latents, mask.flip(1) if flipped and mask is not None else mask
