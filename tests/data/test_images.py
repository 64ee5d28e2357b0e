"""Reading, resizing, cutting and changing images."""

from random import Random

import cv2
import numpy as np
import pytest
from PIL import Image

from library.base.errors import UserError
from library.data import augment, images
from library.data.buckets import Placement

RNG = np.random.default_rng(0)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 240, 5), np.arange(0, 200, 5)), -1)
PICTURE = np.concatenate((SMOOTH, SMOOTH[..., :1] // 2 + 60), axis=2).astype(np.uint8)  # [40, 48, 3]


def saved(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_every_listed_format_is_read_here():
    """The test installation has the optional ones, so that they are really tried."""
    assert set(images.extensions()) == {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
    assert images.optional_formats() == {}


@pytest.mark.parametrize(
    ("name", "options", "exact"),
    [
        ("a.png", {}, True),
        ("a.bmp", {}, True),
        ("a.webp", {"lossless": True}, True),
        ("a.webp", {"quality": 95}, False),
        ("a.jpg", {"quality": 95}, False),
        ("a.avif", {"quality": 95}, False),
        ("a.jxl", {"lossless": True}, True),
    ],
)
def test_formats(tmp_path, name, options, exact):
    images.extensions()  # registers the plugins that saving needs too
    path = saved(tmp_path / name, PICTURE, **options)
    assert images.read_size(path) == (48, 40)
    pixels = images.decode(path)
    assert pixels.dtype == np.uint8 and pixels.shape == PICTURE.shape
    error = np.abs(pixels.astype(int) - PICTURE).mean()
    assert error == 0 if exact else error < 4
    assert not images.looks_truncated(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    grey = np.repeat(PICTURE[..., :1], 3, axis=2)
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    options = {"quality": 98} if suffix == "jpg" else {}
    path = saved(tmp_path / f"a.{suffix}", grey, mode, **options)
    pixels = images.decode(path)
    assert pixels.shape == (40, 48, 3)
    if mode != "1":
        assert np.abs(pixels.astype(int) - grey).max() <= 6
    assert images.decode(path, alpha=True).shape == (40, 48, 4)
    assert images.decode(path, alpha=True)[..., 3].min() == 255


def test_sixteen_bits_are_scaled(tmp_path):
    """Converted as they are, all values above 255 would be white: 99.6 % of this ramp."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = images.decode(tmp_path / "a.png")[..., 0]
    np.testing.assert_array_equal(pixels, (ramp / 257 + 0.5).astype(np.uint8))
    assert pixels.min() == 0 and pixels.max() == 255


def hidden(tmp_path):
    """Red, with a transparent half that hides green."""
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :20] = (255, 0, 0, 255)
    pixels[:, 20:] = (0, 255, 0, 0)
    return saved(tmp_path / "a.png", pixels)


def test_hidden_colours_are_kept_or_covered(tmp_path):
    path = hidden(tmp_path)
    assert tuple(images.decode(path)[0, 39]) == (0, 255, 0)
    assert tuple(images.decode(path, background=(255, 255, 255))[0, 39]) == (255, 255, 255)
    covered = images.decode(path, alpha=True, background=(0, 0, 9))
    assert tuple(covered[0, 39]) == (0, 0, 9, 0) and tuple(covered[0, 0]) == (255, 0, 0, 255)


def test_transparent_palettes(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert images.decode(tmp_path / "a.png", alpha=True)[0].tolist() == [[255, 0, 0, 255], [0, 255, 0, 0]]


@pytest.mark.parametrize(
    ("text", "colour"),
    [(None, None), ("keep", None), ("white", (255, 255, 255)), ("#0a0B0c", (10, 11, 12)), ("grey", (128, 128, 128))],
)
def test_backgrounds(text, colour):
    assert images.parse_background(text) == colour


@pytest.mark.parametrize("text", ["", "#123", "#gggggg", "blue-ish"])
def test_backgrounds_that_are_none(text):
    with pytest.raises(ValueError, match="#rrggbb"):
        images.parse_background(text)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_rule_turns_sizes_and_pixels(tmp_path, orientation, suffix):
    """Otherwise an image would be sorted by one shape and squeezed from another."""
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", upright, exif=exif)
    assert images.has_rotation(path) is (orientation != 1)
    for turn in (False, True):
        height, width = images.decode(path, exif_transpose=turn).shape[:2]
        assert images.read_size(path, exif_transpose=turn) == (width, height)
    pixels = images.decode(path, exif_transpose=True)
    assert (pixels.shape[0] > pixels.shape[1]) is (orientation >= 5)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert pixels[corner[orientation]].mean() > 200
    assert images.decode(path)[0, 0].mean() > 200


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_cut_off_files_are_recognised(tmp_path, name, share):
    path = saved(tmp_path / name, RNG.integers(0, 255, (120, 100, 3), dtype=np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert images.looks_truncated(path)
    with pytest.raises(UserError, match=f"{name}: cannot be decoded|{name}: is not an image"):
        images.decode(path)


def test_odd_but_sound_files_are_not_accused(tmp_path):
    path = saved(tmp_path / "a.jpg", PICTURE)
    with open(path, "ab") as file:
        file.write(bytes(100_000))  # some cameras put a video behind the picture
    assert not images.looks_truncated(path)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, words in (("empty.png", "zero bytes"), ("text.png", "not an image"), ("folder.png", "is a folder")):
        with pytest.raises(ValueError, match=words):
            images.read_size(tmp_path / name)
    with pytest.raises(UserError, match="text.png: is not an image"):
        images.decode(tmp_path / "text.png")
    with pytest.raises(ValueError, match="No such file"):
        images.read_size(tmp_path / "none.png")


def test_names_with_everything(tmp_path):
    folder = tmp_path / "a [1] {b} \N{SNOWMAN}"
    folder.mkdir()
    path = saved(folder / "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{CAT FACE}.PNG", PICTURE)
    np.testing.assert_array_equal(images.decode(path), PICTURE)


def test_a_hundred_megapixels(tmp_path, recwarn):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    assert images.read_size(tmp_path / "a.png") == (10_000, 10_000)
    assert images.decode(tmp_path / "a.png").shape == (10_000, 10_000, 3)
    assert not recwarn.list
    Image.new("1", (60_000, 10_000)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="larger than 500 megapixels"):
        images.read_size(tmp_path / "b.png")


@pytest.mark.parametrize("size", [(24, 20), (90, 80)])
@pytest.mark.parametrize("name", [None, "lanczos", "box", "bicubic", "area", "nearest"])
def test_colours_do_not_depend_on_alpha(size, name):
    """Pillow weighs colours by alpha and cv2 does not; here neither does."""
    alpha = RNG.integers(0, 2, PICTURE.shape[:2] + (1,), dtype=np.uint8) * 255
    both = images.resize(np.concatenate((PICTURE, alpha), axis=2), size, name)
    np.testing.assert_array_equal(both[..., :3], images.resize(PICTURE, size, name))
    np.testing.assert_array_equal(both[..., 3], images.resize(alpha[..., 0], size, name))


def test_methods_when_none_is_named():
    shrunk = cv2.resize(PICTURE, (24, 20), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(images.resize(PICTURE, (24, 20), None), shrunk)
    grown = np.asarray(Image.fromarray(PICTURE).resize((60, 50), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(images.resize(PICTURE, (60, 50), None), grown)
    assert images.resize(PICTURE, (48, 40), "area") is PICTURE


def test_cutting():
    part = images.cut(PICTURE, Placement((10, 12), (48, 40), (3, 5)), None)
    np.testing.assert_array_equal(part, PICTURE[5:17, 3:13])


def test_random_crops_cover_all_places():
    placement = Placement((8, 10), (10, 10), (1, 0))
    crops = {augment.random_crop(placement, Random(n)).crop for n in range(50)}
    assert crops == {(0, 0), (1, 0), (2, 0)}


def test_a_third_of_the_visits_change_colour():
    changed = [augment.colour(PICTURE, Random(n)) for n in range(300)]
    share = np.mean([not np.array_equal(pixels, PICTURE) for pixels in changed])
    assert 0.22 < share < 0.4
    # weak, as its name in the field says: gamma on values from 0 to 255 would move grey by tens
    assert max(np.abs(pixels.astype(int) - PICTURE).mean() for pixels in changed) < 14
    np.testing.assert_array_equal(changed[7], augment.colour(PICTURE, Random(7)))


def test_hue_is_turned_in_the_right_order_of_channels():
    """A red that turns towards yellow and magenta, never (as with red and blue exchanged) a blue."""
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    found = np.array([augment.colour(red, Random(n))[0, 0] for n in range(200)])
    assert (found[:, 0] >= 195).all()
    assert found[:, 1].max() > 30 and found[:, 2].max() > 30
    assert np.minimum(found[:, 1], found[:, 2]).max() < 25


@pytest.mark.parametrize(
    ("stem", "face"),
    [
        ("a_10_20_30_40", (10, 20, 30, 40)),
        ("a_b_10_20_30_40", (10, 20, 30, 40)),
        ("10_20_30_40", None),
        ("a_1_2_x_4", None),
        ("a_1_2_0_4", None),
    ],
)
def test_faces_in_names(stem, face):
    assert augment.face_in_name(stem) == face


@pytest.mark.parametrize("bucket", [(64, 64), (96, 64)])
@pytest.mark.parametrize("shift", [False, True])
def test_crops_around_faces(bucket, shift):
    size, face = (400, 300), (320, 80, 40, 50)
    for seed in range(60):
        place = augment.face_crop(size, bucket, face, (1.5, 3.0), Random(seed), shift=shift)
        assert place.bucket == bucket
        assert all(0 <= start <= full - kept for start, full, kept in zip(place.crop, place.resized, bucket))
        scale = place.resized[0] / size[0]
        assert 1 / 3.1 <= 50 * scale / min(bucket) <= 1 / 1.4
        if not shift:
            centre = face[0] * scale - place.crop[0], face[1] * scale - place.crop[1]
            assert all(0 < value < side for value, side in zip(centre, bucket))
    scales = {augment.face_crop(size, bucket, face, (1.5, 3.0), Random(n), shift=shift).resized for n in range(20)}
    assert len(scales) > 5
    fixed = {augment.face_crop(size, bucket, face, (2.0, 2.0), Random(n), shift=False).resized for n in range(5)}
    assert len(fixed) == 1


def test_small_images_are_enlarged_for_a_face_crop():
    place = augment.face_crop((30, 20), (64, 64), (15, 10, 5, 5), (1, 2), Random(0), shift=False)
    assert place.resized[0] >= 64 and place.resized[1] >= 64
