"""Contact sheets: what is really trained on, seen in their pixels."""

import numpy as np
import pytest
from PIL import Image

from library.base.errors import UserError
from library.config_util import resolve_datasets
from library.data.build import scan
from library.data.dataset import ReadSettings, View
from library.data.order import epoch_batches
from library.data.records import ScanRules
from library.data.sheets import GAP, contact_sheet, debug_lines, debug_sheets, draw_buckets, shown

CELL = 192
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def stripes(path, colours, size=(96, 64), alpha=None):
    """Vertical stripes of equal width, with a caption file."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for part, colour in zip(np.array_split(np.arange(size[0]), len(colours)), colours):
        pixels[:, part] = colour
    if alpha is not None:
        pixels = np.concatenate((pixels, alpha), axis=2)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(f"{path.stem}, tag")


def scanned(folder, *, dataset=(), **subset):
    entry = {"image_dir": str(folder), "caption_extension": ".txt", **subset}
    config = {"datasets": [{"resolution": 64, "subsets": [entry], **dict(dataset)}]}
    return scan(resolve_datasets(config, {}), source="d", seed=0, step=8, rules=ScanRules()).train


def settings(**more):
    return ReadSettings(seed=5, max_steps=10, with_images=False, **more)


def pixels_of(path):
    return np.asarray(Image.open(path)).astype(int)


def cells(sheet, count, width=64, height=64, columns=None):
    """Pictures of the first row of a sheet whose pictures are smaller than its cells."""
    start = [GAP + n * (CELL + GAP) + (CELL - width) // 2 for n in range(columns or count)]
    return [sheet[GAP : GAP + height, left : left + width] for left in start]


def near(pixel, colour):
    return np.abs(np.asarray(pixel) - colour).max() <= 2


def test_sheet_places_pictures_and_texts():
    views = [(np.full((40, 80, 3), shade, np.uint8), "a text") for shade in (50, 100, 150)]
    sheet = contact_sheet(views, columns=2, cell=40)
    pixels = np.asarray(sheet)
    assert sheet.width == GAP + 2 * (40 + GAP)
    assert (pixels[GAP : GAP + 20, GAP : GAP + 40] == 50).all()  # shrunk to 40x20
    assert (pixels[GAP : GAP + 20, 40 + 2 * GAP : 80 + 2 * GAP] == 100).all()
    below = pixels[GAP + 20 :, :]
    assert (below == 150).all(axis=2).sum() == 40 * 20  # the third one begins a new row
    assert below[:14, :40].max() > 200  # letters
    silent = np.asarray(contact_sheet([(picture, "") for picture, _ in views], columns=2, cell=40))
    assert silent[GAP + 20 : GAP + 34, :40].max() < 50


def test_long_texts_stay_in_their_cell():
    black = np.zeros((40, 40, 3), np.uint8)
    sheet = np.asarray(contact_sheet([(black, ""), (black, ""), (black, "m" * 400)], columns=2, cell=80))
    assert sheet[:, : GAP + 80].max() > 200
    assert sheet[:, GAP + 80 + GAP :].max() < 50


def test_the_crop_is_what_is_shown(tmp_path):
    stripes(tmp_path / "a.png", [RED, GREEN, GREEN, GREEN, GREEN, BLUE])  # 96 wide: 16 go on each side
    (path,) = debug_sheets(scanned(tmp_path), settings(), tmp_path / "out", "seen")
    assert path == tmp_path / "out" / "seen_dataset0_64x64.png"
    sheet = pixels_of(path)
    (picture,) = cells(sheet, 1)
    assert (picture == GREEN).all()
    assert not any((sheet == colour).all(axis=2).any() for colour in (RED, BLUE))
    assert not list((tmp_path / "out").glob(".*"))


def test_mirrored_visits_are_mirrored_and_in_order(tmp_path):
    stripes(tmp_path / "a.png", [RED, BLUE], size=(64, 64))
    sets = scanned(tmp_path, flip_aug=True, num_repeats=6)
    lines = debug_lines(sets, settings(), epoch=2, batches=6)
    mirrored = ["flipped" in line for line in lines]
    assert len(lines) == 6 and True in mirrored and False in mirrored
    (path,) = debug_sheets(sets, settings(), tmp_path / "out", "seen", epoch=2)
    first_row = cells(pixels_of(path), 3)
    for picture, flipped in zip(first_row, mirrored):
        assert near(picture[32, 5], BLUE if flipped else RED)


def test_masked_out_parts_are_dimmed(tmp_path):
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[:, 32:] = 0
    stripes(tmp_path / "a.png", [(200, 200, 200)], size=(64, 64), alpha=alpha)
    (plain,) = debug_sheets(scanned(tmp_path), settings(), tmp_path / "plain", "s")
    (masked,) = debug_sheets(scanned(tmp_path, alpha_mask=True), settings(), tmp_path / "masked", "s")
    (picture,) = cells(pixels_of(plain), 1)
    assert near(picture[10, 60], (200, 200, 200))
    (picture,) = cells(pixels_of(masked), 1)
    assert near(picture[10, 5], (200, 200, 200)) and near(picture[10, 60], (50, 50, 50))


def test_control_image_stands_beside_its_image():
    view = View(None, pixels=np.zeros((8, 8, 3), np.uint8), control=np.full((8, 8, 3), 9, np.uint8))
    assert shown(view).shape == (8, 16, 3) and (shown(view)[:, 8:] == 9).all()


def test_one_sheet_per_bucket_with_a_limit(tmp_path):
    for number in range(5):
        stripes(tmp_path / f"wide{number}.png", [GREEN], size=(128, 64))
    stripes(tmp_path / "tall.png", [GREEN], size=(64, 128))
    sets = scanned(tmp_path, dataset={"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 8}.items())
    paths = debug_sheets(sets, settings(), tmp_path / "out", "s", limit=2)
    assert [path.name for path in paths] == ["s_dataset0_40x88.png", "s_dataset0_88x40.png"]
    wide = max(paths, key=lambda path: Image.open(path).width)
    assert Image.open(wide).width == GAP + 2 * (CELL + GAP)
    assert draw_buckets(sets, tmp_path / "buckets.png") == [tmp_path / "buckets.png"]
    assert pixels_of(tmp_path / "buckets.png").std() > 10
    assert draw_buckets([], tmp_path / "none.png") == [] and not (tmp_path / "none.png").exists()


def test_lines_follow_the_order_of_training(tmp_path):
    for name in "abcdef":
        stripes(tmp_path / f"{name}.png", [GREEN])
    sets = scanned(tmp_path, dataset={"batch_size": 2}.items(), caption_prefix="new")
    order = epoch_batches([sets[0].ordered()], 5, 1)
    lines = debug_lines(sets, settings(), batches=2)
    keys = [item.key for batch in order[:2] for item in batch]
    assert [line.split(": ")[1] for line in lines] == keys
    assert "96x64 resized to 96x64, cut to 64x64 at 16,0: " in lines[0]
    assert lines[0].endswith(f"'new {keys[0][0]}, tag'")


def test_an_image_that_cannot_be_decoded_is_a_red_field(tmp_path):
    stripes(tmp_path / "a.png", [GREEN], size=(64, 64))
    sets = scanned(tmp_path)
    (tmp_path / "a.png").write_bytes(b"gone bad")
    (path,) = debug_sheets(sets, settings(), tmp_path / "out", "s")
    red, green, _ = cells(pixels_of(path), 1)[0][32, 32]
    assert red > 2 * green


def test_a_folder_that_cannot_be_written_to(tmp_path):
    stripes(tmp_path / "a.png", [GREEN])
    with pytest.raises(UserError, match="cannot be written"):
        debug_sheets(scanned(tmp_path), settings(), tmp_path / "a.png" / "out", "s")
