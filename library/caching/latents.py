"""Encode all images once, before training."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from library.batch import ItemAddress
from library.data.dataset import ImageSet, TrainDataset


class Encoder(Protocol):
    """What turns images into latents."""

    def encode(self, images: Tensor, items: Sequence[ItemAddress]) -> Tensor:
        """[B, 3, h, w] -> [B, C, H, W]."""
        ...


def _work(sets: Sequence[ImageSet]) -> list[tuple[ItemAddress, bool, tuple[int, int]]]:
    """Every image once, and its mirror where the subset flips: (address, mirrored, bucket), buckets together."""
    work = []
    for number, images in enumerate(sets):
        for index, (record, placement) in enumerate(zip(images.records, images.placements)):
            item = ItemAddress(number, record.subset, index, record.key, 0, 0)
            flips = (False, True) if images.subset_of(item).flip_aug else (False,)
            work += [(item, flip, placement.bucket) for flip in flips]
    return sorted(work, key=lambda entry: (entry[0].dataset, entry[2]))


def _chunks(work: Sequence[Any], size: int) -> Iterator[list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for entry in work:
        groups[entry[0].dataset, entry[2]].append(entry)
    for entries in groups.values():
        yield from (entries[start : start + size] for start in range(0, len(entries), size))


def cache_latents(
    dataset: TrainDataset, encoder: Encoder, *, batch_size: int, show_progress: bool = True
) -> dict[tuple[int, int, bool], Tensor]:
    """Latents of all images of a dataset, in CPU memory.

    Decoding runs ahead in threads while the encoder works.

    Returns:
        (dataset, record, mirrored) -> [C, H, W] float32.
    """
    chunks = list(_chunks(_work(dataset.sets), batch_size))

    def read(chunk: list[Any]) -> Tensor:
        return torch.stack([torch.from_numpy(dataset.pixels(item, flip)) for item, flip, _ in chunk])

    cached: dict[tuple[int, int, bool], Tensor] = {}
    bar = tqdm(total=sum(map(len, chunks)), desc="caching latents", unit="image", disable=not show_progress)
    with ThreadPoolExecutor(2) as pool, bar:
        ahead = [pool.submit(read, chunk) for chunk in chunks[:4]]
        for number, chunk in enumerate(chunks):
            images = ahead.pop(0).result()
            if number + 4 < len(chunks):
                ahead.append(pool.submit(read, chunks[number + 4]))
            latents = encoder.encode(images, [item for item, _, _ in chunk]).cpu()
            for (item, flip, _), latent in zip(chunk, latents):
                cached[item.dataset, item.record, flip] = latent.clone()
            bar.update(len(chunk))
    return cached
