"""Images of every kind are decoded right, or refused in words; resizing, crops and random changes do as promised."""

import colorsys
import multiprocessing
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageOps

from library.base.errors import UserError
from library.data import augment, images
from library.data.buckets import Placement

LOSSLESS = {
    ".png": {},
    ".bmp": {},
    ".webp": {"lossless": True, "exact": True},
    ".jxl": {"lossless": True},
}
NAMES = ("lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "lanczos4", None)
SIZES = ((24, 20), (90, 70), (24, 70))  # shrinks, grows, one side each
FACES = ((500, 400, 100, 120), (20, 30, 60, 50), (980, 790, 200, 300))


def noise(height=30, width=40, channels=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)


def ramp(height=30, width=40):
    """Smooth, so that lossy formats keep it nearly."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((x * 6, y * 8, 255 - x * 3), axis=2).astype(np.uint8)


def saved(path, picture, **how):
    """The path of an array or image, written."""
    images.extensions()  # registers the formats that Pillow does not write by itself
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **how)
    return path


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    """The beginning of a PNG file of black and white; its pixels are missing."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))


# formats


def test_every_known_format_is_read_here():
    """The test extra holds what AVIF and JPEG XL need, so that no test below is left out."""
    assert set(images.extensions()) == {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"}
    assert images.optional_formats() == {}


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_lossless_format_gives_back_every_value(tmp_path, suffix):
    path = saved(tmp_path / f"a{suffix}", noise(), **LOSSLESS[suffix])
    assert images.read_size(path) == (40, 30)
    decoded = images.decode(path)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, noise())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".avif", ".webp", ".jxl"])
def test_a_lossy_format_keeps_size_and_colours(tmp_path, suffix):
    path = saved(tmp_path / f"a{suffix}", ramp(), quality=95)
    assert images.read_size(path) == (40, 30)
    assert np.abs(images.decode(path).astype(int) - ramp()).mean() < 3
    assert not images.looks_truncated(path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jxl"])
def test_alpha_comes_with_the_colours_that_it_hides(tmp_path, suffix):
    pixels = noise(channels=4)
    pixels[:10, :, 3] = 0
    path = saved(tmp_path / f"a{suffix}", pixels, **LOSSLESS[suffix])
    np.testing.assert_array_equal(images.decode(path, alpha=True), pixels)
    np.testing.assert_array_equal(images.decode(path), pixels[..., :3])


def test_alpha_of_avif(tmp_path):
    pixels = np.dstack((ramp(), np.tile(np.arange(0, 240, 6, dtype=np.uint8), (30, 1))))
    decoded = images.decode(saved(tmp_path / "a.avif", pixels, quality=100), alpha=True)
    assert np.abs(decoded[..., 3].astype(int) - pixels[..., 3]).max() <= 2


def test_jpeg_xl_is_read_in_a_worker_that_imported_nothing(tmp_path):
    path = saved(tmp_path / "a.jxl", noise(), lossless=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(images.decode, path).result(timeout=60), noise())


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200)]
    path = saved(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:], **LOSSLESS[suffix])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert (images.decode(path) == 40).all()


@pytest.mark.parametrize("name", ["two words.png", "\U0001f600 \u732b.png", "[a]*{b}%.png"])
def test_any_name_will_do(tmp_path, name):
    path = saved(tmp_path / name, noise())
    assert images.read_size(path) == (40, 30)
    np.testing.assert_array_equal(images.decode(path), noise())
    path.write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        images.decode(path)
    assert str(path) in str(error.value)


# modes; TIFF stands in for formats that hold modes which PNG does not


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


def grey_values(path):
    """Grey and alpha of an image whose channels are equal."""
    decoded = images.decode(path, alpha=True)
    assert (decoded[..., :3] == decoded[..., :1]).all()
    np.testing.assert_array_equal(images.decode(path), decoded[..., :3])
    return decoded[..., 0], decoded[..., 3]


def test_black_and_white(tmp_path):
    bits = noise()[..., 0] > 127
    colour, alpha = grey_values(saved(tmp_path / "a.png", bits))
    np.testing.assert_array_equal(colour, np.where(bits, 255, 0))
    assert (alpha == 255).all()


def test_greyscale_with_and_without_alpha(tmp_path):
    pixels = noise(channels=2)
    colour, alpha = grey_values(saved(tmp_path / "l.png", np.ascontiguousarray(pixels[..., 0])))
    np.testing.assert_array_equal(colour, pixels[..., 0])
    assert (alpha == 255).all()
    colour, alpha = grey_values(saved(tmp_path / "la.png", pixels))
    np.testing.assert_array_equal(np.dstack((colour, alpha)), pixels)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 250])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path / "a.png", image, **({"transparency": 1} if transparent else {}))
    assert images.decode(path).tolist() == [[[200, 10, 20], [30, 40, 250]]]
    assert images.decode(path, alpha=True)[0, :, 3].tolist() == [255, 0 if transparent else 255]


def test_palette_with_alpha(tmp_path):
    image = Image.fromarray(np.full((2, 2, 4), (255, 0, 0, 90), np.uint8)).convert("PA")
    path = saved(tmp_path / "a.png", image, format="TIFF")
    assert mode_of(path) == "PA"
    assert images.decode(path, alpha=True)[0, 0].tolist() == [255, 0, 0, 90]


def test_transparent_colour_without_an_alpha_channel(tmp_path):
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    path = saved(tmp_path / "a.png", pixels, transparency=(4, 5, 6))
    assert images.decode(path, alpha=True).tolist() == [[[1, 2, 3, 255], [4, 5, 6, 0]]]


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(ramp()).convert("CMYK"), quality=95)
    assert mode_of(path) == "CMYK"
    assert np.abs(images.decode(path).astype(int) - ramp()).mean() < 3


def test_ycbcr_becomes_rgb(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(ramp()).convert("YCbCr"), format="TIFF")
    assert mode_of(path) == "YCbCr"
    assert np.abs(images.decode(path).astype(int) - ramp()).mean() < 3


@pytest.mark.parametrize("kind", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, kind):
    """The reference makes 99.6 % of this ramp white."""
    values = np.arange(65536).reshape(256, 256)
    how = {"format": "TIFF"} if kind == "I" else {}
    path = saved(tmp_path / "a.png", values.astype(np.int32 if kind == "I" else np.uint16), **how)
    assert mode_of(path) == kind
    colour, alpha = grey_values(path)
    np.testing.assert_array_equal(colour, np.rint(values / 257))
    assert (colour.min(), colour.max()) == (0, 255) and (np.diff(colour.ravel().astype(int)) >= 0).all()
    assert (alpha == 255).all()


def test_sixteen_bits_stay_dark_where_the_whole_image_is_dark(tmp_path):
    path = saved(tmp_path / "a.png", np.full((4, 4), 255, np.int32), format="TIFF")
    assert (images.decode(path) == 1).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_fractions_range_to_one_or_to_white(tmp_path, scale):
    values = np.linspace(0, scale, 256, dtype=np.float32)[None]
    colour, _ = grey_values(saved(tmp_path / "a.png", values, format="TIFF"))
    assert np.abs(colour[0].astype(int) - np.arange(256)).max() <= 1
    assert (colour[0, 0], colour[0, -1]) == (0, 255)


# transparency on a background


def test_transparent_pixels_are_laid_on_the_background(tmp_path):
    pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 128]]], np.uint8)
    path = saved(tmp_path / "a.png", pixels)
    composed = [[0, 0, 100], [200, 0, 0], [100, 0, 50]]
    assert images.decode(path, background=(0, 0, 100)).tolist() == [composed]
    with_alpha = images.decode(path, background=(0, 0, 100), alpha=True)
    assert with_alpha[..., :3].tolist() == [composed] and with_alpha[0, :, 3].tolist() == [0, 255, 128]
    assert images.decode(path)[0, :, 0].tolist() == [200, 200, 200]


def test_a_background_changes_no_image_without_alpha(tmp_path):
    path = saved(tmp_path / "a.png", noise())
    np.testing.assert_array_equal(images.decode(path, background=(255, 255, 255)), noise())


def test_names_of_backgrounds():
    known = {"white": (255,) * 3, "black": (0,) * 3, "grey": (128,) * 3, "gray": (128,) * 3, "#0aFf10": (10, 255, 16)}
    assert {name: images.parse_background(name) for name in known} == known
    assert images.parse_background(None) is None and images.parse_background("keep") is None
    for text in ("", "red", "#fff", "#gggggg", "#+1+1+1", "0aff10", "#0aff1000"):
        with pytest.raises(ValueError, match="#rrggbb"):
            images.parse_background(text)


# orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
def test_size_and_pixels_are_turned_alike(tmp_path, suffix, orientation):
    path = saved(tmp_path / f"a{suffix}", ramp(), exif=turned(orientation))
    assert images.has_rotation(path) is (orientation != 1)
    plain, upright = images.decode(path), images.decode(path, exif_transpose=True)
    assert images.read_size(path) == (40, 30) == plain.shape[1::-1]
    assert images.read_size(path, exif_transpose=True) == upright.shape[1::-1]
    assert upright.shape[1::-1] == ((30, 40) if orientation >= 5 else (40, 30))
    with Image.open(path) as image:
        np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(image)))
    assert images.decode(path, exif_transpose=True, alpha=True).shape == (*upright.shape[:2], 4)


def test_sixteen_bits_and_palettes_are_turned_too(tmp_path):
    grey = saved(tmp_path / "grey.png", np.arange(12, dtype=np.uint16).reshape(3, 4) * 5140, exif=turned(6))
    np.testing.assert_array_equal(images.decode(grey, exif_transpose=True), np.rot90(images.decode(grey), -1))
    palette = saved(tmp_path / "p.png", Image.fromarray(ramp()).quantize(8), exif=turned(6), transparency=0)
    straight = images.decode(palette, alpha=True)
    assert set(np.unique(straight[..., 3])) == {0, 255}
    np.testing.assert_array_equal(images.decode(palette, alpha=True, exif_transpose=True), np.rot90(straight, -1))


def test_orientation_behind_the_pixels_is_heeded_nowhere(tmp_path):
    """Knowing of it would need the whole file, where only headers are read."""
    path = saved(tmp_path / "a.png", noise())
    data = path.read_bytes()
    path.write_bytes(data[:-12] + png_chunk(b"eXIf", turned(6).removeprefix(b"Exif\0\0")) + data[-12:])
    with Image.open(path) as image:
        image.load()
        assert image.getexif()[0x0112] == 6
    assert not images.has_rotation(path) and images.read_size(path, exif_transpose=True) == (40, 30)
    np.testing.assert_array_equal(images.decode(path, exif_transpose=True), noise())


def test_jpeg_xl_is_turned_by_its_decoder_and_not_once_more(tmp_path):
    path = saved(tmp_path / "a.jxl", noise(), lossless=True, exif=turned(6))
    assert images.read_size(path, exif_transpose=True) == (40, 30) and not images.has_rotation(path)
    np.testing.assert_array_equal(images.decode(path, exif_transpose=True), noise())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\x7f", turned(0), turned(9)]
)
def test_damaged_exif_data_turns_nothing(tmp_path, exif, suffix):
    path = saved(tmp_path / f"a{suffix}", ramp(), exif=exif)
    assert not images.has_rotation(path)
    assert images.read_size(path, exif_transpose=True) == (40, 30)
    assert images.decode(path, exif_transpose=True).shape == (30, 40, 3)


# files that cannot be used


def refused(path, reason):
    """Reading its size says why in few words; decoding names the file and what to do as well."""
    with pytest.raises(ValueError) as short:
        images.read_size(path)
    assert reason in str(short.value) and str(path) not in str(short.value)
    with pytest.raises(UserError) as full:
        images.decode(path)
    assert str(full.value).startswith(f"{path}: ")
    assert "--skip_bad_images" in str(full.value) and "\n" not in str(full.value)
    assert not images.has_rotation(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".avif", ".jxl"])
def test_file_without_an_image_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    refused(path, "is empty (zero bytes)")
    path.write_text("some text " * 50)
    refused(path, "is not an image, whatever its name says")
    assert not images.looks_truncated(path)


def test_what_the_system_does_not_open_is_refused(tmp_path):
    folder, loop, gone = (tmp_path / name for name in ("folder.png", "loop.png", "gone.png"))
    folder.mkdir()
    refused(folder, "is a folder")
    loop.symlink_to(loop)
    refused(loop, "cannot be read: Too many levels of symbolic links")
    refused(gone, "cannot be read: No such file or directory")
    for path in (folder, loop, gone):
        with pytest.raises(OSError):
            images.looks_truncated(path)


def test_damaged_header_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(40, 30)[:20])
    refused(path, "cannot be read: ")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9, -40])
def test_a_missing_end_is_noticed(tmp_path, suffix, kept):
    path = saved(tmp_path / f"a{suffix}", noise(90, 120))
    data = path.read_bytes()
    assert not images.looks_truncated(path)
    path.write_bytes(data[: kept if kept < 0 else int(len(data) * kept)])
    assert images.looks_truncated(path)
    with pytest.raises(UserError, match=f"a{suffix}: cannot be decoded: .*--skip_bad_images"):
        images.decode(path)


@pytest.mark.parametrize(("suffix", "reason"), [(".avif", ""), (".jxl", "its data is damaged; ")])
def test_a_missing_end_of_other_formats_is_noticed_at_the_latest_when_decoding(tmp_path, suffix, reason):
    path = saved(tmp_path / f"a{suffix}", noise(90, 120))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"a{suffix}: .*{reason}.*--skip_bad_images"):
        images.decode(path)


def test_the_end_of_a_thumbnail_is_not_that_of_the_image(tmp_path):
    thumbnail = BytesIO()
    Image.fromarray(noise(8, 8)).save(thumbnail, "JPEG")
    path = saved(tmp_path / "a.jpg", noise(90, 120), comment=thumbnail.getvalue())
    data = path.read_bytes()
    assert data.count(b"\xff\xd9") == 2 and not images.looks_truncated(path)
    path.write_bytes(data[: len(data) // 2])
    assert images.looks_truncated(path)


def test_odd_but_sound_files_are_not_accused(tmp_path):
    path = saved(tmp_path / "a.jpg", ramp())
    path.write_bytes(path.read_bytes() + b"\0" * 100_000 + b"a film " * 20_000)
    assert not images.looks_truncated(path)
    path = saved(tmp_path / "a.png", noise())
    path.write_bytes(path.read_bytes()[:-12])  # the end mark is missing, and nothing else
    assert not images.looks_truncated(path)


# large images


@pytest.mark.filterwarnings("error")
def test_a_hundred_megapixels(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("1", (10_000, 10_000), 1))
    assert images.read_size(path) == (10_000, 10_000) and not images.looks_truncated(path)
    decoded = images.decode(path)
    assert decoded.shape == (10_000, 10_000, 3) and decoded[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_up_to_five_hundred_megapixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(25_000, 20_000) + png_chunk(b"IDAT", b""))
    assert images.read_size(path) == (25_000, 20_000)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("side", [20_001, 39_999, 60_000])
def test_larger_images_are_refused(tmp_path, side, strict):
    """Whether Pillow only warns, refuses, or is told to turn warnings into errors."""
    path = tmp_path / "a.png"
    path.write_bytes(png_header(25_000, side) + png_chunk(b"IDAT", b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        refused(path, "is larger than 500 megapixels: make it smaller")


# resizing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_colours_are_resized_the_same_with_and_without_alpha(name, size):
    """Pillow weighs colours by alpha and cv2 does not; here neither does."""
    pixels = noise(50, 60, 4)
    pixels[:25, :, 3] = 0
    both = images.resize(pixels, size, name)
    assert both.shape == (size[1], size[0], 4) and both.dtype == np.uint8
    np.testing.assert_array_equal(both[..., :3], images.resize(np.ascontiguousarray(pixels[..., :3]), size, name))
    np.testing.assert_array_equal(both[..., 3], images.resize(np.ascontiguousarray(pixels[..., 3]), size, name))


@pytest.mark.parametrize("size", SIZES)
def test_area_shrinks_and_lanczos_enlarges_by_default(size):
    pixels = noise(50, 60)
    expected, other = ("area", "lanczos") if size == SIZES[0] else ("lanczos", "area")
    np.testing.assert_array_equal(images.resize(pixels, size, None), images.resize(pixels, size, expected))
    assert (images.resize(pixels, size, None) != images.resize(pixels, size, other)).any()


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
def test_cut_takes_its_part_of_any_number_of_channels(channels):
    pixels = np.random.default_rng(2).integers(0, 256, (30, 40, *channels), dtype=np.uint8)
    part = images.cut(pixels, Placement((10, 8), (40, 30), (5, 2)), None)
    np.testing.assert_array_equal(part, pixels[2:10, 5:15])
    assert images.cut(pixels, Placement((10, 8), (20, 15), (5, 2)), None).shape == (8, 10, *channels)


# random changes


def contains(placement, point=None):
    """Whether the crop lies inside the resized image, and the point (of the resized image) inside the crop."""
    for axis in (0, 1):
        start, kept, full = placement.crop[axis], placement.bucket[axis], placement.resized[axis]
        if not 0 <= start <= full - kept:
            return False
        if point is not None and not start <= point[axis] <= start + kept:
            return False
    return True


def test_random_crops_reach_every_place_equally():
    rng, placement = Random(0), Placement((8, 8), (11, 9), (1, 0))
    found = [augment.random_crop(placement, rng) for _ in range(4000)]
    assert {(one.bucket, one.resized) for one in found} == {((8, 8), (11, 9))}
    counts = [sum(one.crop == (x, y) for one in found) for x in range(4) for y in range(2)]
    assert sum(counts) == 4000 and min(counts) > 400 and max(counts) < 600


def test_colours_change_in_a_third_of_the_visits():
    pixels, rng = noise(8, 8), Random(0)
    found = [augment.colour(pixels, rng) for _ in range(1500)]
    assert all(one.dtype == np.uint8 and one.shape == pixels.shape for one in found)
    assert 0.29 < sum((one != pixels).any() for one in found) / 1500 < 0.37
    np.testing.assert_array_equal(pixels, noise(8, 8))  # a visit leaves the image as it was


def test_hue_turns_by_the_angle_drawn_in_the_order_of_rgb():
    """With red and blue exchanged, as in the reference, it turns the other way."""
    pixels, angles = np.full((2, 2, 3), (200, 80, 40), np.uint8), []
    before = colorsys.rgb_to_hsv(200, 80, 40)
    for seed in range(200):
        twin = Random(seed)
        if twin.random() > 0.33 or twin.random() >= 0.5:
            continue
        angle = 2 * twin.uniform(-8, 8)
        after = colorsys.rgb_to_hsv(*augment.colour(pixels, Random(seed))[0, 0].tolist())
        assert (after[0] - before[0]) * 360 == pytest.approx(angle, abs=0.5)
        assert after[1:] == pytest.approx(before[1:], abs=0.01)
        angles.append(angle)
    assert min(angles) < -10 and max(angles) > 10


def test_gamma_is_weak_and_keeps_black_and_white():
    pixels, middles = np.array([[[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8), set()
    for seed in range(300):  # turning the hue of grey changes nothing, so that every change is gamma
        black, middle, white = augment.colour(pixels, Random(seed))[0, :, 0].tolist()
        assert (black, white) == (0, 255) and 123 <= middle <= 133
        middles.add(middle)
    assert {125, 128, 131} <= middles


@pytest.mark.parametrize(
    ("stem", "face"),
    [
        ("photo_512_300_120_140", (512, 300, 120, 140)),
        ("two_names_1_2_3_4", (1, 2, 3, 4)),
        ("512_300_120_140", None),
        ("photo_512_300_120_x", None),
        ("photo_512_300_1.5_140", None),
        ("photo_512_300_0_0", None),
        ("photo_512__120_140", None),
        ("photo", None),
    ],
)
def test_a_face_is_the_last_four_numbers_of_a_name(stem, face):
    assert augment.face_in_name(stem) == face


@pytest.mark.parametrize("bucket", [(256, 256), (192, 320), (448, 128)])
@pytest.mark.parametrize("face", FACES)
def test_a_face_crop_holds_the_centre_of_the_face_at_the_size_asked(bucket, face):
    cover, side, largest = max(bucket[0] / 1000, bucket[1] / 800), min(bucket), max(face[2:])
    least = min(1, max(cover, side / (largest * 4)))
    most = min(1, max(least, side / (largest * 2)))
    scales = []
    for seed in range(50):
        placement = augment.face_crop((1000, 800), bucket, face, (2.0, 4.0), Random(seed), shift=False)
        scale = placement.resized[0] / 1000
        assert placement.bucket == bucket and placement.resized[1] / 800 == pytest.approx(scale, abs=2e-3)
        assert contains(placement, (face[0] * scale, face[1] * scale))
        scales.append(scale)
    assert least - 1e-3 <= min(scales) <= least + 0.2 * (most - least) + 1e-3
    assert most + 1e-3 >= max(scales) >= most - 0.2 * (most - least) - 1e-3


def test_the_middle_of_a_face_crop_is_the_face():
    for seed in range(50):
        placement = augment.face_crop((1000, 800), (256, 256), FACES[0], (2.0, 4.0), Random(seed), shift=False)
        scale = placement.resized[0] / 1000
        for axis in (0, 1):
            away = placement.crop[axis] + 128 - FACES[0][axis] * scale
            assert abs(away) <= 120 * scale / 20 + 1.5


def test_a_face_crop_without_a_choice_is_always_the_same():
    """A smaller face would need an enlarged image, which only covering the bucket may do."""
    found = {augment.face_crop((1000, 800), (256, 256), FACES[0], (2, 2), Random(s), shift=False) for s in range(20)}
    assert found == {Placement((256, 256), (1000, 800), (500 - 128, 400 - 128))}


def test_a_shifted_face_crop_stays_inside_and_moves_further_than_a_centred_one():
    def starts(shift):
        size, face = (900, 900), (450, 450, 128, 128)
        found = [augment.face_crop(size, (256, 256), face, (2, 4), Random(s), shift=shift) for s in range(300)]
        assert all(contains(placement) for placement in found)
        return np.array([one.crop[0] + 128 - 450 * one.resized[0] / 900 for one in found])

    assert starts(True).std() > 10 * starts(False).std() > 0
    assert abs(starts(True).mean()) < 0.2 * starts(True).std()


def test_a_shifted_face_crop_reaches_the_far_end_of_the_image():
    """The sum of two draws up to the image's length reaches its last third with a chance of one in eighteen."""
    face = (50, 50, 50, 50)
    found = [augment.face_crop((300, 100), (100, 100), face, (2, 2), Random(s), shift=True) for s in range(500)]
    assert {one.resized for one in found} == {(300, 100)}
    assert 12 < sum(one.crop[0] == 200 for one in found) < 50


def test_an_image_smaller_than_the_bucket_is_enlarged_to_cover_it():
    placement = augment.face_crop((100, 90), (256, 320), (50, 40, 30, 30), (2, 4), Random(0), shift=False)
    assert placement.resized == (356, 320) and contains(placement, (50 * 3.56, 40 * 3.56))


def test_equal_seeds_give_equal_changes():
    placement, pixels = Placement((64, 64), (200, 150), (0, 0)), noise(8, 8)

    def all_of(seed):
        rng = Random(seed)
        crops = [augment.random_crop(placement, rng) for _ in range(5)]
        faces = [augment.face_crop((900, 900), (64, 64), FACES[0], (2, 4), rng, shift=s) for s in (True, False)]
        return crops, faces, [augment.colour(pixels, rng).tobytes() for _ in range(20)]

    assert all_of(1) == all_of(1)
    assert all(one != other for one, other in zip(all_of(1), all_of(2)))
