"""The order of an epoch: a pure function of (seed, epoch), independent of workers, ranks and history."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.base.randomness import python_random
from library.batch import ItemAddress


@dataclass(frozen=True)
class BatchSpec:
    """One batch to be read.

    Attributes:
        items: the visits in it, all of one dataset and bucket.
        ordinal: position in the epoch, counted over all ranks.
        step: optimizer steps taken before it, for caption warm-up.
    """

    items: tuple[ItemAddress, ...]
    ordinal: int
    step: int = 0


@dataclass(frozen=True)
class OrderedDataset:
    """What ordering needs to know of a dataset.

    Attributes:
        keys: image key of each record.
        subsets: subset index of each record.
        repeats: visits per epoch of each record.
        buckets: bucket size of each record.
        batch_size: images per batch; a bucket's last batch may be smaller.
    """

    keys: Sequence[str]
    subsets: Sequence[int]
    repeats: Sequence[int]
    buckets: Sequence[tuple[int, int]]
    batch_size: int

    def bucket_counts(self) -> Mapping[tuple[int, int], int]:
        """Visits per epoch of each bucket, ascending by size."""
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for bucket, repeats in zip(self.buckets, self.repeats):
            counts[bucket] += repeats
        return dict(sorted((bucket, count) for bucket, count in counts.items() if count))

    def num_batches(self) -> int:
        """Batches per epoch."""
        return sum(-(-count // self.batch_size) for count in self.bucket_counts().values())


def epoch_batches(datasets: Sequence[OrderedDataset], seed: int, epoch: int) -> list[tuple[ItemAddress, ...]]:
    """All batches of an epoch in their order: every record exactly `repeats` times."""
    batches: list[tuple[ItemAddress, ...]] = []
    for index, dataset in enumerate(datasets):
        buckets: dict[tuple[int, int], list[ItemAddress]] = defaultdict(list)
        for record, (key, subset, repeats, bucket) in enumerate(
            zip(dataset.keys, dataset.subsets, dataset.repeats, dataset.buckets)
        ):
            buckets[bucket] += [ItemAddress(index, subset, record, key, n, epoch) for n in range(repeats)]
        for bucket, items in sorted(buckets.items()):
            python_random(seed, "order", epoch, index, *bucket).shuffle(items)
            size = dataset.batch_size
            batches += [tuple(items[start : start + size]) for start in range(0, len(items), size)]
    python_random(seed, "batches", epoch).shuffle(batches)
    return batches


def validation_batches(datasets: Sequence[OrderedDataset]) -> list[tuple[ItemAddress, ...]]:
    """Every record once, unshuffled and always under the same addresses (epoch 0)."""
    batches: list[tuple[ItemAddress, ...]] = []
    for index, dataset in enumerate(datasets):
        buckets: dict[tuple[int, int], list[ItemAddress]] = defaultdict(list)
        for record, (key, subset, bucket) in enumerate(zip(dataset.keys, dataset.subsets, dataset.buckets)):
            buckets[bucket].append(ItemAddress(index, subset, record, key, 0, 0))
        for _, items in sorted(buckets.items()):
            size = dataset.batch_size
            batches += [tuple(items[start : start + size]) for start in range(0, len(items), size)]
    return batches
