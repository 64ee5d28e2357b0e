"""Batches of a run, window by window, from any position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.base.errors import UserError
from library.batch import TrainBatch
from library.data.dataset import TrainDataset
from library.data.order import BatchSpec, epoch_batches


@dataclass
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        batches: those of this rank; with several ranks the last window of an epoch may give some ranks fewer.
        count: batches over all ranks: each loss counts 1/count.
        epoch: from 1.
        first: ordinal of the first batch of the window in its epoch.
        is_last: whether the epoch ends with it.
    """

    batches: Iterator[TrainBatch]
    count: int
    epoch: int
    first: int
    is_last: bool


class _EpochSampler(Sampler[BatchSpec]):
    """Hands out the specifications it was last given, so that worker processes can outlive an epoch."""

    def __init__(self) -> None:
        self.specs: Sequence[BatchSpec] = ()

    def __iter__(self) -> Iterator[BatchSpec]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


class _Reader(Dataset["TrainBatch | UserError"]):
    """Hands a user's error on as a value: raised in a worker it would arrive as a traceback in a text."""

    def __init__(self, dataset: TrainDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, spec: BatchSpec) -> TrainBatch | UserError:
        try:
            return self.dataset[spec]
        except UserError as error:
            return error


def _single(batch: TrainBatch | UserError) -> TrainBatch | UserError:
    return batch


class TrainData:
    """The training data of one process.

    A window holds `accumulation * world_size` batches of the epoch's order; position s of rank r is batch
    s * world_size + r, so several ranks see together what one process with more accumulation sees.
    """

    def __init__(
        self, dataset: TrainDataset, *, accumulation: int, world_size: int = 1, rank: int = 0, workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.ordered = [images.ordered() for images in dataset.sets]
        self.window_size = accumulation * world_size
        self.world_size = world_size
        self.rank = rank
        self._sampler = _EpochSampler()
        self._loader = DataLoader(
            _Reader(dataset),
            batch_size=None,
            sampler=self._sampler,
            collate_fn=_single,
            num_workers=workers,
            persistent_workers=workers > 0,
            # the loader seeds its workers from here; ours draw from addresses and never look at it
            generator=torch.Generator().manual_seed(0),
        )

    @property
    def num_batches(self) -> int:
        """Batches per epoch over all ranks."""
        return sum(dataset.num_batches() for dataset in self.ordered)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.num_batches // self.window_size)

    def windows(self, epoch: int, *, start: int = 0, step: int = 0) -> Iterator[Window]:
        """The windows of an epoch.

        Args:
            epoch: from 1.
            start: batches of the epoch that were trained on already, over all ranks.
            step: optimizer steps taken before `start`.
        """
        batches = epoch_batches(self.ordered, self.dataset.settings.seed, epoch)
        bounds = [
            (low, min(low + self.window_size, len(batches))) for low in range(start, len(batches), self.window_size)
        ]
        self._sampler.specs = [
            BatchSpec(batches[ordinal], ordinal, step + number)
            for number, (low, high) in enumerate(bounds)
            for ordinal in self._mine(low, high)
        ]
        stream = iter(self._loader)
        for low, high in bounds:
            mine = len(self._mine(low, high))
            yield Window(_take(stream, mine), high - low, epoch, low, is_last=high == len(batches))

    def _mine(self, low: int, high: int) -> range:
        return range(low + self.rank, high, self.world_size)


def _take(stream: Iterator[TrainBatch | UserError], count: int) -> Iterator[TrainBatch]:
    for _ in range(count):
        batch = next(stream)
        if isinstance(batch, UserError):
            raise batch
        yield batch
