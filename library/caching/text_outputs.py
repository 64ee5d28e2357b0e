"""Encode all captions once, before training: into memory, or into files beside the images."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.errors import UserError
from library.base.logs import logger
from library.batch import Conditioning, ItemAddress
from library.caching.files import CacheDamaged
from library.caching.latent_files import Status
from library.caching.latents import all_items
from library.caching.pipeline import overlap
from library.caching.text_files import EMPTY, FoundText, TextLayout, TextRequest, find_text, read_text, write_text
from library.data.dataset import TrainDataset

C = TypeVar("C", bound=Conditioning)
Encode = Callable[[list[str]], Conditioning]  # texts -> conditioning of the batch
_MANY = 500


class Packer(Protocol):
    """A family's way between conditioning and the arrays of its cache files."""

    def pack(self, conditioning: Any) -> dict[str, Tensor]:
        """Conditioning of one sample -> arrays without batch axis."""
        ...

    def unpack(self, arrays: Mapping[str, Tensor]) -> Conditioning:
        """The inverse."""
        ...

    def collate(self, items: list[Conditioning]) -> Conditioning:
        """Join samples along the batch axis."""
        ...


def cache_text_outputs(
    captions: Iterable[str], encode: Callable[[list[str]], C], *, batch_size: int, show_progress: bool = True
) -> dict[str, C]:
    """Conditioning of every distinct caption, in CPU memory.

    Args:
        captions: texts as the model will see them.
        encode: texts -> conditioning of the batch.
        batch_size: captions per call.
        show_progress: draw a progress bar.

    Returns:
        caption -> conditioning of one sample.
    """
    texts = sorted(set(captions))
    cached: dict[str, C] = {}
    with _bar(len(texts), "caching text encoder outputs", "caption", show_progress) as bar:
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            cached.update(zip(chunk, _encode(encode, chunk)))
            bar.update(len(chunk))
    return cached


@torch.no_grad()
def _encode(encode: Callable[[list[str]], C], texts: list[str]) -> list[C]:
    encoded = encode(texts).to(torch.device("cpu"))
    return [encoded.item(index) for index in range(len(texts))]


def _bar(total: int, text: str, unit: str, show: bool) -> tqdm:
    return tqdm(total=total, desc=text, unit=unit, disable=not show or not total, dynamic_ncols=True)


def _empty_base(base: str) -> str:
    return str(Path(base).parent / EMPTY)


class TextFiles:
    """The text encoder caches of some datasets on disk.

    Args:
        datasets: for training and for validation; the same image may be in several.
        layout: how files are named and laid out.
        packer: of the family.
        recipe: digest of encoders and settings.
    """

    def __init__(
        self, datasets: Sequence[TrainDataset], layout: TextLayout, packer: Packer, recipe: tuple[int, int]
    ) -> None:
        self.layout = layout
        self.packer = packer
        texts: dict[str, list[str]] = {}
        for dataset in datasets:
            for item in all_items(dataset):
                base = dataset.record(item).cache_base
                own = [text for text in dataset.texts(item) if text]
                if own:
                    texts.setdefault(base, []).extend(own)
                if len(own) < len(dataset.texts(item)):
                    texts.setdefault(_empty_base(base), []).append("")
        self.requests = {
            base: TextRequest(base=base, texts=tuple(dict.fromkeys(wanted)), recipe=recipe)
            for base, wanted in sorted(texts.items())
        }
        self.found: dict[str, FoundText] = {}

    def survey(self, *, trust: bool = False, verify: bool = False, show_progress: bool = True) -> None:
        """Look at every file; see `text_files.find_text`."""
        bases = [base for base in self.requests if base not in self.found or self.found[base].missing]
        show = show_progress and len(bases) >= _MANY
        with ThreadPoolExecutor(4) as pool, _bar(len(bases), "looking at text caches", "file", show) as bar:
            looked = pool.map(
                lambda base: find_text(self.layout, self.requests[base], trust=trust, verify=verify),
                bases,
                chunksize=32,
            )
            for base, found in zip(bases, looked):
                self.found[base] = found
                bar.update(1)

    def pending(self) -> list[str]:
        """Files that lack something."""
        return [base for base, found in self.found.items() if not found.status.usable]

    def report(self) -> str:
        """What was found, in words; damaged files are named in a warning."""
        counts = Counter(found.status for found in self.found.values())
        for found in self.found.values():
            if found.status is Status.DAMAGED:
                logger.warning("%s is damaged and will be made again", found.path)
        return ", ".join(f"{count} {status.value}" for status, count in counts.items()) or "no captions"

    def fill(
        self, encode: Encode, *, batch_size: int, rank: int = 0, world_size: int = 1, show_progress: bool = True
    ) -> None:
        """Encode this rank's share of what is pending, and write it while the next is encoded.

        Raises:
            UserError: a file cannot be written.
        """
        numbers = {base: number for number, base in enumerate(self.requests)}
        mine = [base for base in self.pending() if numbers[base] % world_size == rank]

        def compute(chunk: list[str], _: None) -> list[Conditioning]:
            texts = [text for base in chunk for text in self.found[base].missing]
            return [
                made
                for start in range(0, len(texts), batch_size)
                for made in _encode(encode, texts[start : start + batch_size])
            ]

        def write(chunk: list[str], made: list[Conditioning]) -> None:
            left = iter(made)
            for base in chunk:
                outputs = {text: self.packer.pack(next(left)) for text in self.found[base].missing}
                try:
                    path = write_text(self.layout, self.requests[base], outputs)
                except OSError as error:
                    message = f"cannot be written: {error.strerror or error}; make room, or use "
                    message += "--cache_text_encoder_outputs alone (memory)"
                    raise UserError(str(self.layout.path(base)), message=message) from error
                self.found[base] = FoundText(Status.VALID, path, ())

        with _bar(len(mine), "caching text encoder outputs", "image", show_progress) as bar:
            overlap(
                self._chunks(mine, batch_size), lambda _: None, compute, write, lambda chunk: bar.update(len(chunk))
            )

    def _chunks(self, bases: Sequence[str], batch_size: int) -> Iterator[list[str]]:
        """Files whose texts together fill a batch."""
        chunk: list[str] = []
        count = 0
        for base in bases:
            chunk.append(base)
            count += len(self.found[base].missing)
            if count >= batch_size:
                yield chunk
                chunk, count = [], 0
        if chunk:
            yield chunk

    def reader(self, dataset: TrainDataset) -> "DiskTexts":
        """Reads the entries of one of the datasets.

        Raises:
            UserError: entries are missing: another process should have made them.
        """
        missing = self.pending()
        if missing:
            name = self.layout.path(missing[0])
            raise UserError(str(name), message="another process should have made it; do all see the same folders?")
        bases = {(item.dataset, item.record): dataset.record(item).cache_base for item in all_items(dataset)}
        return DiskTexts(self.layout, self.packer, self.requests, self.found, bases)


class DiskTexts:
    """Reads text encoder outputs from files; small enough to be sent to worker processes."""

    def __init__(
        self,
        layout: TextLayout,
        packer: Packer,
        requests: Mapping[str, TextRequest],
        found: Mapping[str, FoundText],
        bases: Mapping[tuple[int, int], str],
    ) -> None:
        self.layout = layout
        self.packer = packer
        self.requests = requests
        self.found = found
        self.bases = bases

    def read(self, item: ItemAddress, text: str) -> Conditioning:
        """See TextReader.

        Raises:
            UserError: the file was damaged or removed since the start.
        """
        base = self.bases[item.dataset, item.record]
        base = base if text else _empty_base(base)
        path = self.found[base].path
        assert path is not None
        try:
            return self.packer.unpack(read_text(self.layout, path, self.requests[base].key(text)))
        except CacheDamaged as error:
            message = f"cannot be read any more ({error}); start again, and it is made anew"
            raise UserError(str(path), message=message) from error

    def collate(self, items: list[Conditioning]) -> Conditioning:
        """See TextReader."""
        return self.packer.collate(items)
