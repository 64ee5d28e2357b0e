"""Everything that people feed a trainer by mistake: one clear problem each, or it simply works."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from library.config_util import resolve_datasets
from library.data import images
from library.data.records import ScanRules, scan_dataset


def picture(path, size=(40, 30), caption="a caption"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    """A good image; what is wrong comes beside it."""
    picture(tmp_path / "img" / "good.png")
    return tmp_path / "img"


def scanned(folder, *, skip=False, **subset):
    entry = {"image_dir": str(folder), "caption_extension": ".txt", **subset}
    plans = resolve_datasets({"datasets": [{"resolution": 64, "subsets": [entry]}]}, {})
    return scan_dataset(plans[0].subsets, where="d.toml: datasets[0]", rules=ScanRules(skip_bad_images=skip))


def problem(folder, *parts, **subset):
    """The only problem: it names its place, and every given part."""
    _, problems = scanned(folder, **subset)
    assert len(problems) == 1, problems
    text = str(problems[0])
    assert text.startswith("d.toml: datasets[0]")
    for part in parts:
        assert part in text
    return text


def works(folder, count=2, **subset):
    records, problems = scanned(folder, **subset)
    assert not problems and len(records) == count
    return {record.key: record for record in records}


def test_missing_folder(tmp_path):
    problem(tmp_path / "none", "subsets[0].image_dir", str(tmp_path / "none"), "no such folder; correct the path")


def test_file_instead_of_folder(folder):
    problem(folder / "good.png", "good.png", "is no folder; expected the folder")


def test_empty_folder(tmp_path):
    problem(tmp_path, str(tmp_path), "holds no images (.png", "put images directly into it")


def test_folder_with_text_files_only(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    problem(tmp_path, str(tmp_path), "it holds 2 .txt", "put images directly into it")


def test_folder_with_formats_that_need_a_package(tmp_path, messages, without_jxl):
    suffix, package = next(iter(images.optional_formats().items()))
    package = shlex.quote(package)
    (tmp_path / f"a{suffix.upper()}").write_bytes(b"x")
    problem(tmp_path, f"1 {suffix}", f"pip install {package}")
    picture(tmp_path / "b.png")
    works(tmp_path, 1)
    assert f"1 {suffix} file" in messages.text and f"pip install {package}" in messages.text


def test_captions_under_another_extension(folder):
    problem(folder, "caption_extension", str(folder), 'set caption_extension = ".txt"', caption_extension=".caption")


def test_zero_byte_image(folder):
    (folder / "bad.png").write_bytes(b"")
    problem(folder, str(folder / "bad.png"), "is empty (zero bytes)", "repair or remove it", "--skip_bad_images")


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp", "bad.bmp"])
@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_truncated_image(folder, name, keep):
    """The reference began to train, and stopped where it came to the image."""
    data = picture(folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep)])
    problem(folder, str(folder / name), "--skip_bad_images")
    assert list(works(folder, 1, skip=True)) == ["good.png"]


@pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp", "bad.bmp"])
def test_text_file_named_as_an_image(folder, name):
    (folder / name).write_text("not an image " * 100)
    problem(folder, str(folder / name), "is not an image, whatever its name says", "--skip_bad_images")


def test_folder_named_as_an_image(folder):
    (folder / "bad.png").mkdir()
    problem(folder, str(folder / "bad.png"), "is a folder, not an image", "remove it")


def test_link_to_nothing(folder):
    (folder / "bad.png").symlink_to(folder / "gone.png")
    problem(folder, str(folder / "bad.png"), "No such file", "repair or remove it")


def test_hundred_megapixels(folder):
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    (folder / "large.txt").write_text("large")
    assert works(folder)["large.png"].size == (10_000, 10_000)


def test_one_pixel(folder):
    assert works(picture(folder / "one.png", (1, 1)).parent)["one.png"].size == (1, 1)


def test_caption_that_is_a_folder(folder):
    picture(folder / "bad.png", caption=None)
    (folder / "bad.txt").mkdir()
    problem(folder, str(folder / "bad.txt"), "is a folder; expected a text file")


def test_caption_without_permission(folder):
    picture(folder / "bad.png")
    (folder / "bad.txt").chmod(0)
    try:
        (folder / "bad.txt").read_text()
    except PermissionError:
        problem(folder, str(folder / "bad.txt"), "Permission denied", "check its permissions")
    else:
        pytest.skip("this user may read everything")


def test_caption_link_that_leads_in_circles(folder):
    picture(folder / "bad.png", caption=None)
    (folder / "bad.txt").symlink_to(folder / "bad.txt")
    problem(folder, str(folder / "bad.txt"), "cannot be read", "check its permissions")


def test_caption_in_another_encoding(folder):
    picture(folder / "bad.png")
    (folder / "bad.txt").write_bytes("caf\u00e9".encode("latin-1"))
    problem(folder, str(folder / "bad.txt"), "is not UTF-8 text", "save it as UTF-8")


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_empty_caption(folder, text):
    picture(folder / "bad.png", caption=text)
    problem(folder, str(folder / "bad.txt"), "is an empty caption; write a caption or delete the file")


def test_caption_with_byte_order_mark(folder):
    picture(folder / "a.png", caption="\ufeffb\u00e4r\r\n")
    assert works(folder)["a.png"].caption == "b\u00e4r"


NAMES = ("two words", "\U0001f600", "[1]", "a[!b]*", "\u00e4\u00df\u732b", "100%", "a.b.c", "{a}")


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names(tmp_path, name):
    """In the reference brackets in a folder's name switched off a part of the search."""
    picture(tmp_path / name / f"{name}.png", caption=name)
    picture(tmp_path / name / "control" / f"{name}.jpg", caption=None)
    record = works(tmp_path / name, 1, conditioning_data_dir=str(tmp_path / name / "control"))[f"{name}.png"]
    assert (record.size, record.caption) == ((40, 30), name)
    assert record.control == tmp_path / name / "control" / f"{name}.jpg"
    assert record.cache_base == str(tmp_path / name / name)
    works(tmp_path / name, 1, cache_info=True)
    works(tmp_path / name, 1, cache_info=True)


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names_in_metadata(tmp_path, name):
    picture(tmp_path / name / f"{name}.png")
    file = tmp_path / "m.json"
    file.write_text(json.dumps({name: {"caption": name}}, ensure_ascii=False), encoding="utf-8")
    assert works(tmp_path / name, 1, metadata_file=str(file))[f"{name}.png"].caption == name


def test_missing_control_folder(folder):
    missing = str(folder / "none")
    problem(folder, "conditioning_data_dir", missing, "no such folder", conditioning_data_dir=missing)


def test_missing_control_images(folder, tmp_path):
    control = tmp_path / "control"
    picture(control / "good.png")
    for number in range(12):
        picture(folder / f"x{number:02d}.png")
    text = problem(folder, str(control), "12 images without control image", conditioning_data_dir=str(control))
    assert "x09.png and 2 more" in text and "add images of the same name" in text


def test_control_images_without_image(folder, tmp_path):
    control = tmp_path / "control"
    for name in ("good", "extra"):
        picture(control / f"{name}.png", caption=None)
    text = problem(folder, str(control), "1 control image without image", conditioning_data_dir=str(control))
    assert "extra.png; add their images or remove them" in text


def test_control_image_of_another_size(folder, tmp_path):
    control = tmp_path / "control"
    picture(control / "good.png", (30, 40))
    text = problem(folder, str(control / "good.png"), "30 x 40", "40 x 30", conditioning_data_dir=str(control))
    assert "must have the size of its image" in text and "resize" in text


def test_control_image_that_cannot_be_read(folder, tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    (control / "good.png").write_bytes(b"")
    text = problem(folder, str(folder / "good.png"), str(control / "good.png"), conditioning_data_dir=str(control))
    assert "is empty" in text and "--skip_bad_images" in text


def test_damaged_metadata(folder, tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"image_path": "good.png", "caption": "c"}\n{"image_path": ')
    problem(folder, f"{file}: line 2", "is damaged JSON", "expected one object per line", metadata_file=str(file))


def test_everything_at_once(folder):
    """All problems come together, not one run after another."""
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("text")
    picture(folder / "latin.png")
    (folder / "latin.txt").write_bytes(b"\xe9")
    _, problems = scanned(folder)
    assert sorted(str(p).split(": ")[2].rsplit("/", 1)[1] for p in problems) == ["latin.txt", "text.png", "zero.png"]
