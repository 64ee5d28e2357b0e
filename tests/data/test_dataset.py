"""What a visit of an image shows and says; each test fails on a known defect of the field's usual scripts."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from library.caching.latents import _pieces, all_items
from library.config_util import resolve_datasets
from library.data.build import ImageSets, scan
from library.data.dataset import ReadSettings, TrainDataset
from library.data.loader import TrainData
from library.data.records import ScanRules
from library.train_util import make_options
from library.training.checks import _subset_problems
from library.training.plan import data_workers


def gradient(width, height):
    """Every pixel says where it is."""
    x, y = np.meshgrid(np.arange(width) * 255 // width, np.arange(height) * 255 // height)
    return np.stack((x, y, (x + y) // 2), axis=2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "img"
    path.mkdir()
    for number, size in enumerate([(400, 300), (300, 400), (256, 256), (500, 200)]):
        Image.fromarray(gradient(*size)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"{number}, b, c, d")
    return path


def build(folder, *, settings=None, validation=False, **subset):
    keys = ("resolution", "batch_size", "enable_bucket", "bucket_no_upscale")
    dataset = {"resolution": 256, "enable_bucket": True, **{k: subset.pop(k) for k in keys if k in subset}}
    entry = {"image_dir": str(folder), "caption_extension": ".txt", **subset}
    plans = resolve_datasets({"datasets": [{**dataset, "subsets": [entry]}]}, {})
    images = scan(plans, source="test", seed=1, step=64, rules=ScanRules())
    given = {"seed": 1, "max_steps": 10, "with_images": True, **(settings or {})}
    return TrainDataset(images.validation if validation else images.train, ReadSettings(**given))


def batches(data, epoch=1, workers=0):
    loader = TrainData(data, accumulation=1, workers=workers)
    return [batch for window in loader.windows(epoch) for batch in window.batches]


def test_masks_and_control_images_lie_over_their_image(folder, tmp_path):
    """Squeezed into the bucket, as the reference does, column 64 of a 400x300 mask would be column 43 of the image."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in folder.glob("*.png"):
        (masks / path.name).write_bytes(path.read_bytes())
    more = {"conditioning_data_dir": str(masks), "flip_aug": True}
    masked = build(folder, settings={"masked_loss": True}, **more)
    paired = build(folder, **more)
    for item in all_items(masked):
        for flipped in (False, True):
            view, pair = masked.view(item, flipped), paired.view(item, flipped)
            np.testing.assert_array_equal(view.mask, view.pixels[..., 0])
            np.testing.assert_array_equal(pair.control, pair.pixels)
        mirrored, plain = masked.view(item, True), masked.view(item, False)
        np.testing.assert_array_equal(mirrored.pixels, plain.pixels[:, ::-1])
        np.testing.assert_array_equal(mirrored.mask, plain.mask[:, ::-1])
    (batch,) = [batch for batch in batches(masked) if batch.image_keys == ["0.png"]]
    assert batch.masks.shape == batch.images[:, 0].shape
    assert torch.allclose(batch.masks * 2 - 1, batch.images[:, 0], atol=1e-6)
    assert batches(paired)[0].masks is None and batches(paired)[0].control_images is not None


def test_masks_do_not_change_what_happens_to_captions(folder, tmp_path):
    """There, every caption is dropped with every-n-epochs dropout, and warm-up never moves."""
    masks = {"conditioning_data_dir": str(folder)}
    data = build(folder, settings={"masked_loss": True}, caption_dropout_every_n_epochs=2, **masks)
    assert all(text for batch in batches(data, epoch=1) for text in batch.captions)
    assert not any(text for batch in batches(data, epoch=2) for text in batch.captions)
    warm = build(folder, settings={"masked_loss": True}, token_warmup_step=4, **masks)
    item = next(all_items(warm))
    assert [len(warm.caption(item, step).split(", ")) for step in (0, 4)] == [1, 4]
    attributes = build(folder, custom_attributes={"diff_output_preservation": True}, **masks)
    assert batches(attributes)[0].attributes[0] == {"diff_output_preservation": True}


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_are_dropped_in_their_epochs_only(folder, workers):
    """The first batch of each worker belongs to epoch 0 there, and 0 is a multiple of everything."""
    data = build(folder, caption_dropout_every_n_epochs=100)
    assert all(text for epoch in (1, 2) for batch in batches(data, epoch, workers) for text in batch.captions)


def test_validation_keeps_its_captions_and_never_mirrors(folder):
    data = build(
        folder,
        validation=True,
        validation_split=0.5,
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=1,
        flip_aug=True,
    )
    for item in all_items(data):
        assert data.caption(item, 0) and not data.is_flipped(item)


@pytest.mark.parametrize("workers", [0, 2])
def test_chance_differs_from_image_to_image(folder, workers):
    """There all workers draw the same numbers from their second image on."""
    for path in folder.glob("*.txt"):
        path.write_text("{" + "|".join(map(str, range(1000))) + "}")
    data = build(folder, enable_wildcard=True, num_repeats=5)
    texts = [text for batch in batches(data, workers=workers) for text in batch.captions]
    assert len(texts) == 20 and len(set(texts)) >= 17


def test_global_generators_are_left_alone(folder):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches(build(folder, shuffle_caption=True, flip_aug=True, color_aug=True, random_crop=True, validation_split=0.3))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_images_without_buckets_of_any_size(folder):
    """There the size must be right unless latents are cached, and a mirrored one has its left edge at the right."""
    data = build(folder, enable_bucket=False, flip_aug=True)
    seen = {}
    for epoch in range(1, 9):
        for batch in batches(data, epoch):
            assert batch.images.shape[2:] == (256, 256)
            seen.setdefault((batch.image_keys[0], batch.flipped[0]), batch.crop_top_lefts[0].tolist())
    assert seen["2.png", True] == seen["2.png", False] == [0, 0]


def test_random_crops_move_and_are_recorded(folder):
    data = build(folder, random_crop=True)
    corners = set()
    for epoch in range(1, 20):
        for batch in batches(data, epoch):
            if batch.image_keys == ["0.png"]:
                x, y, width, _ = batch.pixel_crops[0].tolist()
                corners.add((x, y))
                pixels = data.view(batch.items[0], False).pixels
                # column x of the resized image says where it comes from
                assert abs(int(pixels[0, 0, 0]) - x * 255 // width) <= 2
    assert len(corners) > 8


def test_faces_are_cut_with_buckets_too(tmp_path):
    Image.fromarray(gradient(800, 600)).save(tmp_path / "photo_600_300_200_160.png")
    (tmp_path / "photo.txt").write_text("face crops share the caption of their photo")
    data = build(tmp_path, face_crop_aug_range=[2, 2])
    item = next(all_items(data))
    place = data.placement(item)
    scale = place.resized[0] / 800
    assert place.crop[0] <= 600 * scale <= place.crop[0] + place.bucket[0]
    assert 200 * scale * 2 == pytest.approx(min(place.bucket), rel=0.02)
    assert data.caption(item, 0).startswith("face crops")


def test_colours_change_now_and_then(folder):
    data, plain = build(folder, color_aug=True), build(folder)
    changed = []
    for epoch in range(1, 30):
        for batch in batches(data, epoch):
            pixels = plain.view(batch.items[0], False).pixels
            changed.append(not np.array_equal(data.view(batch.items[0], False).pixels, pixels))
    assert 0.2 < np.mean(changed) < 0.5


def test_metadata_files_are_split_and_need_no_cache(folder, tmp_path):
    """There, training and validation both get all images, and without cached latents there is a crash."""
    listing = tmp_path / "list.jsonl"
    lines = [json.dumps({"image_path": f"{n}.png", "caption": "a", "tags": "b"}) for n in range(4)]
    listing.write_text("\n".join(lines))
    more = {"metadata_file": str(listing), "validation_split": 0.5}
    train, held_out = build(folder, **more), build(folder, validation=True, **more)
    keys = [{record.key for images in data.sets for record in images.records} for data in (train, held_out)]
    assert len(keys[0]) == len(keys[1]) == 2 and not keys[0] & keys[1]
    assert batches(train)[0].captions == ["a,b"]


def test_control_images_are_split_with_their_images(folder):
    """There the control images of held-out images count as left over, and stop the run."""
    more = {"conditioning_data_dir": str(folder), "validation_split": 0.5}
    assert len(batches(build(folder, **more))) == 2
    assert build(folder, validation=True, **more).view(next(all_items(build(folder, validation=True, **more))), False)


def test_images_of_equal_area_do_not_break_batches(tmp_path):
    """Sorted by area alone, tall and wide images take turns, and every batch has one image."""
    for number in range(8):
        size = (400, 300) if number % 2 else (300, 400)
        Image.fromarray(gradient(*size)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    data = build(tmp_path)
    pieces = _pieces(data, list(all_items(data)), 4)
    assert [len(piece.items) for piece in pieces] == [4, 4]
    assert all(len({data.placement(item).bucket for item in piece.items}) == 1 for piece in pieces)


def test_cached_variants_differ_from_image_to_image(folder):
    data = build(folder, settings={"caption_variants": 2}, shuffle_caption=True)
    orders = {tuple(text.replace(str(n), "a") for text in data.texts(item)) for n, item in enumerate(all_items(data))}
    assert len(orders) >= 3


def test_worker_processes_are_started_for_what_has_to_be_decoded(folder):
    plain, paired = build(folder), build(folder, conditioning_data_dir=str(folder))

    def workers(data, **options):
        given = make_options("sd", "network", {"max_data_loader_n_workers": 1, **options})
        return data_workers(given, ImageSets(data.sets, ()))

    assert workers(plain) == 1
    assert workers(plain, cache_latents=True) == workers(plain, cache_latents_to_disk=True) == 0
    # masks in files are decoded at every visit, unless they are kept in memory with the latents
    assert workers(paired, cache_latents_to_disk=True) == 1
    assert workers(paired, cache_latents=True) == 0


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"diff_output_preservatoin": True}, "did you mean diff_output_preservation?"),
        ({"diff_output_preservation": 1}, "expected true or false"),
        ({"timestep_sampling": 3}, "expected a table"),
        ({"timestep_sampling": {"ofset": 1}}, "expected offset"),
        ({"timestep_sampling": {"offset": "1"}}, "expected a number"),
    ],
)
def test_attributes_that_nothing_reads(folder, attributes, words):
    subset = build(folder, custom_attributes=attributes).sets[0].plan.subsets[0]
    (problem,) = _subset_problems(subset, make_options("sd", "network", {}), "d.toml")
    assert words in str(problem)


def test_a_narrow_image_is_named_or_left_out(folder):
    from library.base.errors import UserError

    Image.fromarray(gradient(600, 63)).save(folder / "narrow.png")
    (folder / "narrow.txt").write_text("x")
    with pytest.raises(UserError, match=r"narrow\.png: is 600x63 pixels"):
        build(folder, bucket_no_upscale=True)
    assert len(build(folder).sets[0].records) == 5
