"""The order of an epoch, and windows over it."""

from collections import Counter

import pytest

from library.config_util import resolve_datasets
from library.data.build import scan
from library.data.dataset import ReadSettings, TrainDataset, balanced_repeats, split_validation
from library.data.loader import TrainData
from library.data.order import OrderedDataset, epoch_batches
from library.data.records import ScanRules


def ordered(count=23, batch_size=4, repeats=2):
    buckets = [(64, 64 if index % 3 else 128) for index in range(count)]
    return OrderedDataset([f"{n}.png" for n in range(count)], [0] * count, [repeats] * count, buckets, batch_size)


def test_every_image_exactly_its_repeats():
    batches = epoch_batches([ordered(), ordered(5, 2, 3)], seed=1, epoch=4)
    seen = Counter((item.dataset, item.key) for batch in batches for item in batch)
    assert all(count == (2 if dataset == 0 else 3) for (dataset, _), count in seen.items())
    assert len(seen) == 28
    assert all(len({(item.dataset) for item in batch}) == 1 for batch in batches)


def test_order_depends_on_seed_and_epoch_alone():
    first = epoch_batches([ordered()], 1, 4)
    assert first == epoch_batches([ordered()], 1, 4)
    assert first != epoch_batches([ordered()], 1, 5)
    assert first != epoch_batches([ordered()], 2, 4)


def test_batches_hold_one_bucket():
    data = ordered()
    for batch in epoch_batches([data], 1, 1):
        assert len({data.buckets[item.record] for item in batch}) == 1


@pytest.fixture
def dataset(inputs):
    config = {
        "datasets": [
            {
                "resolution": 128,
                "batch_size": 2,
                "enable_bucket": True,
                "min_bucket_reso": 64,
                "max_bucket_reso": 256,
                "subsets": [{"image_dir": str(inputs.folder / "data" / "img"), "caption_extension": ".txt"}],
            }
        ]
    }
    images = scan(resolve_datasets(config, {}), source="test", seed=0, step=64, rules=ScanRules())
    return TrainDataset(images.train, ReadSettings(seed=3, max_steps=10, with_images=False, prior_loss_weight=0.5))


def collect(data, epoch=1, **position):
    return [[batch.image_keys for batch in window.batches] for window in data.windows(epoch, **position)]


def test_windows_cover_the_epoch(dataset):
    data = TrainData(dataset, accumulation=4)
    windows = collect(data)
    assert [len(window) for window in windows] == [4, 2]
    assert data.steps_per_epoch == 2
    assert sorted(key for window in windows for batch in window for key in batch) == sorted(data.ordered[0].keys)


def test_windows_from_a_position_are_the_rest(dataset):
    data = TrainData(dataset, accumulation=2)
    assert collect(data, start=2, step=1) == collect(data)[1:]


def test_workers_do_not_matter(dataset):
    assert collect(TrainData(dataset, accumulation=2, workers=2)) == collect(TrainData(dataset, accumulation=2))


def test_ranks_share_a_window_as_one_process_sees_it(dataset):
    alone = collect(TrainData(dataset, accumulation=4))
    ranks = [collect(TrainData(dataset, accumulation=2, world_size=2, rank=rank)) for rank in (0, 1)]
    for number, window in enumerate(alone):
        shared = [None] * len(window)
        for rank in (0, 1):
            shared[rank::2] = ranks[rank][number]
        assert shared == window


def test_count_is_the_number_of_batches_that_exist(dataset):
    data = TrainData(dataset, accumulation=2, world_size=2, rank=1)
    counts = [(window.count, len(list(window.batches)), window.is_last) for window in data.windows(1)]
    assert counts == [(4, 2, False), (2, 1, True)]


def test_worker_processes_outlive_an_epoch(dataset):
    data = TrainData(dataset, accumulation=1, workers=1)
    first, second = collect(data, epoch=1), collect(data, epoch=2)
    assert first != second
    assert sorted(sum(sum(first, []), [])) == sorted(sum(sum(second, []), []))


def subsets(*entries):
    config = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": name, **more} for name, more in entries]}]}
    return resolve_datasets(config, {})[0]


class Record:
    def __init__(self, subset):
        self.subset = subset


@pytest.mark.parametrize(("repeats", "expected"), [(1, [7, 7, 6]), (4, [7, 7, 6]), (15, [15, 15, 0])])
def test_regularization_images_balance_the_training_images(repeats, expected):
    plan = subsets(("a", {"num_repeats": 20}), ("b", {"is_reg": True, "num_repeats": repeats}))
    assert balanced_repeats(plan.subsets, [Record(0), *[Record(1)] * 3]) == [20, *expected]


@pytest.mark.parametrize("split", [0.05, 0.2, 0.25, 0.5, 1.0])
def test_validation_split_neither_leaks_nor_loses(split):
    shared = {"validation_split": split, "validation_seed": 7}
    plan = subsets(("a", shared), ("b", {"is_reg": True, **shared}))
    records = [Record(0)] * 11 + [Record(1)] * 3
    train, held_out = split_validation(plan, records, seed=0)
    assert sorted(train + held_out) == list(range(14))
    assert not set(train) & set(held_out)
    assert {11, 12, 13} <= set(train)
    assert split_validation(plan, records, seed=5) == (train, held_out)


def test_subsets_are_split_on_their_own():
    plan = subsets(("a", {"validation_split": 1.0}), ("b", {}), ("c", {"validation_split": 0.5}))
    records = [Record(0)] * 3 + [Record(1)] * 3 + [Record(2)] * 4
    train, held_out = split_validation(plan, records, seed=0)
    assert set(held_out) >= {0, 1, 2} and not set(held_out) & {3, 4, 5}
    assert len(set(held_out) & {6, 7, 8, 9}) == 2
    # without a seed of its own, the run's decides: the reference draws twice and leaks
    assert any(split_validation(plan, records, seed=seed) != (train, held_out) for seed in range(1, 6))


def test_batches_are_put_together_anew_every_epoch():
    """Not only the order of batches changes: images of a bucket meet others."""
    data = OrderedDataset([f"{n}.png" for n in range(12)], [0] * 12, [1] * 12, [(64, 64)] * 12, 3)
    groups = [{frozenset(item.key for item in batch) for batch in epoch_batches([data], 1, epoch)} for epoch in (1, 2)]
    assert groups[0] != groups[1]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_image_is_seen_exactly_as_often_as_asked(inputs, workers, ranks):
    """With worker processes the reference repeats some images and misses others in every epoch."""
    base = inputs.folder / "data"
    for batch_size in (3,) if workers else (1, 2, 3, 4, 7, 100):
        config = {
            "datasets": [
                {
                    "resolution": size,
                    "batch_size": batch_size,
                    "enable_bucket": True,
                    "min_bucket_reso": 64,
                    "max_bucket_reso": 256,
                    "caption_extension": ".txt",
                    "subsets": [
                        {"image_dir": str(base / "img"), "num_repeats": 3},
                        {"image_dir": str(base / "alpha"), "num_repeats": 2},
                    ],
                }
                for size in (64, 128)
            ]
        }
        images = scan(resolve_datasets(config, {}), source="test", seed=0, step=64, rules=ScanRules())
        settings = ReadSettings(seed=3, max_steps=10, with_images=False)
        datas = [
            TrainData(
                TrainDataset(images.train, settings), accumulation=2, world_size=ranks, rank=rank, workers=workers
            )
            for rank in range(ranks)
        ]
        for epoch in (1, 2):
            seen = Counter()
            for data in datas:
                for window in data.windows(epoch):
                    for batch in window.batches:
                        seen.update((item.dataset, item.subset, item.key) for item in batch.items)
            assert len(seen) == 2 * (10 + 4)
            assert all(count == (3 if subset == 0 else 2) for (_, subset, _), count in seen.items())


def test_the_order_does_not_depend_on_what_was_read_before(dataset):
    """A function of seed and epoch alone."""
    data = TrainData(dataset, accumulation=1)
    straight = {epoch: collect(data, epoch) for epoch in (1, 2, 3)}
    other = TrainData(dataset, accumulation=1)
    assert collect(other, 3) == straight[3]
    assert collect(other, 1) == straight[1]
    assert straight[1] != straight[2] != straight[3]
