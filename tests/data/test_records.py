"""Folders with everything that can be wrong in them."""

import shutil

import numpy as np
import pytest
from PIL import Image

from library.base.errors import UserError
from library.config_util import resolve_datasets
from library.data import images
from library.data.buckets import Placement
from library.data.build import scan


@pytest.fixture
def folder(inputs, tmp_path):
    place = tmp_path / "img"
    shutil.copytree(inputs.folder / "data" / "img", place)
    return place


def scanned(folder, *, allow=False, **subset):
    entry = {"image_dir": str(folder), "caption_extension": ".txt", **subset}
    plans = resolve_datasets({"datasets": [{"resolution": 64, "subsets": [entry]}]}, {})
    return scan(plans, source="d", seed=0, step=64, allow_missing_captions=allow).train[0].records


def problems(call):
    with pytest.raises(UserError) as error:
        call()
    return "\n".join(str(problem) for problem in error.value.problems)


def test_sorted_by_name_with_sizes_and_captions(folder):
    records = scanned(folder)
    assert [record.key for record in records] == sorted(record.key for record in records)
    assert len(records) == 10
    first = records[0]
    assert (first.key, first.size) == ("astronaut.png", (160, 160))
    assert first.caption.startswith("1girl, solo")


def test_names_with_spaces_and_other_alphabets(folder):
    for name in ("a b", "katze \u00e4\u00f6", "\U0001f600"):
        shutil.copy(folder / "cat.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    assert {record.caption for record in scanned(folder)} >= {"a b", "katze \u00e4\u00f6", "\U0001f600"}


def test_broken_images_are_all_named(folder):
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    found = problems(lambda: scanned(folder))
    assert "zero.png: is empty (zero bytes)" in found
    assert "text.jpg: is not an image, whatever its name says" in found


def test_truncated_image_is_named_when_it_is_read(folder):
    data = (folder / "cat.png").read_bytes()
    (folder / "cat.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cat.png: cannot be decoded"):
        images.decode(folder / "cat.png")


def test_captions_that_cannot_be_read(folder):
    (folder / "cat.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "coins.txt").write_text("\n\n")
    found = problems(lambda: scanned(folder))
    assert "cat.txt: is not UTF-8 text" in found
    assert "coins.txt: is an empty caption" in found


def test_byte_order_mark_is_no_part_of_a_caption(folder):
    (folder / "cat.txt").write_text("a cat", encoding="utf-8-sig")
    assert "a cat" in {record.caption for record in scanned(folder)}


def test_captions_under_another_extension_stop(folder):
    found = problems(lambda: scanned(folder, caption_extension=".caption"))
    assert "10 of 10 images" in found and 'set caption_extension = ".txt"' in found
    assert all(record.caption == "" for record in scanned(folder, caption_extension=".caption", allow=True))


def test_many_missing_captions_stop_few_do_not(folder):
    (folder / "cat.txt").unlink()
    assert "" in {record.caption for record in scanned(folder)}
    (folder / "coins.txt").unlink()
    assert "2 of 10 images" in problems(lambda: scanned(folder))
    assert len(scanned(folder, class_tokens="thing")) == 10


def test_empty_and_missing_folders(tmp_path):
    assert "no such folder" in problems(lambda: scanned(tmp_path / "x"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.tiff").write_text("")
    assert "holds no images" in problems(lambda: scanned(tmp_path / "x"))
    assert "1 .tiff" in problems(lambda: scanned(tmp_path / "x"))


def test_cut_is_the_middle_of_the_resized_image():
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(20)
    part = images.cut(pixels, Placement((10, 10), (20, 10), (5, 0)), None)
    assert part.shape == (10, 10, 3)
    assert part[0, :, 0].tolist() == list(range(5, 15))


@pytest.mark.parametrize(
    "name", ["lanczos", "nearest", "bilinear", "bicubic", "area", "box", "linear", "cubic", "lanczos4", None]
)
def test_interpolations(name):
    pixels = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))
    resized = images.resize(pixels, (32, 48), name)
    assert resized.shape == (48, 32, 3)
    assert abs(float(resized.mean()) - float(pixels.mean())) < 4


def test_unit_range():
    assert images.to_unit_range(np.array([[[0, 128, 255]]], dtype=np.uint8)).ravel() == pytest.approx(
        [-1, 0.00392, 1], abs=1e-4
    )


def test_every_kind_of_png_decodes(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (8, 6)).save(path)
        assert images.decode(path).shape == (6, 8, 3)
