"""Bucket sizes, assignment and crops, against worked examples of the reference."""

import json

import pytest
from support.runs import GOLDEN

from library.data.buckets import Bucketing, stated_crop

ROWS = json.loads((GOLDEN / "buckets.json").read_text())


def bucketing(resolution, low, high, steps, no_upscale=False, enabled=True):
    return Bucketing(tuple(resolution), low // steps * steps, -(-high // steps) * steps, steps, no_upscale, enabled)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['image']}-{row['steps']}-{row['no_upscale']}")
def test_worked_examples(row):
    place = bucketing(row["resolution"], row["min"], row["max"], row["steps"], row["no_upscale"]).place(
        tuple(row["image"])
    )
    assert place.bucket == tuple(row["bucket"])
    assert place.resized == tuple(row["resized"])
    left, top, right, bottom = row["pixel_crop"]
    assert (*place.crop, place.crop[0] + place.bucket[0], place.crop[1] + place.bucket[1]) == (left, top, right, bottom)
    assert stated_crop(tuple(row["image"]), place.bucket) == pytest.approx(row["stated"], abs=1e-3)


def test_all_examples_are_there():
    assert len(ROWS) == 35


@pytest.mark.parametrize(
    ("resolution", "low", "high", "steps", "count"),
    [
        ((1024, 1024), 256, 2048, 64, 41),
        ((1024, 1024), 256, 1024, 64, 25),
        ((512, 512), 256, 1024, 64, 17),
        ((768, 512), 256, 1024, 64, 19),
        ((1024, 1024), 256, 2048, 32, 81),
        ((1024, 1024), 256, 1536, 8, 235),
    ],
)
def test_number_of_buckets(resolution, low, high, steps, count):
    assert len(bucketing(resolution, low, high, steps).sizes) == count


@pytest.mark.parametrize(
    ("size", "fits"), [((63, 600), False), ((600, 63), False), ((1, 5000), False), ((64, 64), True)]
)
def test_images_narrower_than_a_step_are_refused_without_enlarging(size, fits):
    """The reference makes empty buckets of these, or divides by zero."""
    own = bucketing((512, 512), 256, 1024, 64, no_upscale=True)
    reason = own.refusal(size)
    assert (reason is None) is fits
    if fits:
        assert min(own.place(size).bucket) >= 64
    else:
        assert f"{size[0]}x{size[1]}" in reason and "bucket_reso_steps" in reason
    # with enlarging every size has a bucket
    assert bucketing((512, 512), 256, 1024, 64).refusal(size) is None
    assert min(bucketing((512, 512), 256, 1024, 64).place(size).bucket) >= 256


@pytest.mark.parametrize(
    ("size", "resized"), [((700, 500), (717, 512)), ((400, 300), (683, 512)), ((512, 512), (512, 512))]
)
def test_without_buckets_everything_is_covered_and_cut(size, resized):
    place = bucketing((512, 512), 256, 1024, 64, enabled=False).place(size)
    assert (place.bucket, place.resized) == ((512, 512), resized)
